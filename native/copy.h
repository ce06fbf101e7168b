// Copying bytes: between two mapped ranges, and between this process and another.
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/types.h>

namespace raynixl {

struct Segment {
  uint64_t source;
  uint64_t destination;
  uint64_t nbytes;
};

enum class Mode : int { copy = 0, vm_read = 1, vm_write = 2 };

// Total from which a copy is streamed past the cache: 3/8 of the last-level cache, 4 to 24 MiB.
uint64_t stream_threshold();

// Smallest block worth streaming: measured 7.3 against 5.5 GB/s at 4 KiB random blocks, no gain below.
constexpr uint64_t kStreamBlock = 4096;

// Copy one block with ordinary stores, through the cache.
void copy_block(void* destination, const void* source, size_t nbytes);

// Copy one block with stores that bypass the cache; call stream_fence() before telling anyone.
void stream_block(void* destination, const void* source, size_t nbytes);
void stream_fence();

// Move segments between this process and `pid`. Returns 0 or -errno.
int move_segments(Mode mode, pid_t pid, const Segment* segments, size_t count);

// Whether every page of the range is mapped in this process.
bool is_mapped(uint64_t address, uint64_t nbytes);

}  // namespace raynixl
