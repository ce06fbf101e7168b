// Deltas of weights: which elements differ between two copies of the same ranges, and writing them into a third.
//
// An element is `itemsize` bytes, compared bitwise; its number is its position divided by itemsize. Numbers ascend and
// are coded as gaps: how many elements lie between one and the next that changed. A gap below 253 is one byte; 253,
// 254 and 255 say that it follows in 2, 4 or 8 bytes. With 1 % of the elements changed at random that is 1.16 bytes a
// gap. raynixl/native/twin_delta.py is the same in numpy.
#pragma once

#include <cstddef>
#include <cstdint>

#include <vector>

namespace raynixl {

constexpr int kArenaBit = 48;  // a position is arena << kArenaBit | offset

struct DeltaRow {
  uint64_t before;
  uint64_t after;
  uint64_t nbytes;
  uint64_t position;
};

struct Arena {
  uint64_t address;
  uint64_t nbytes;
};

struct Delta {
  std::vector<uint8_t> gaps;
  std::vector<uint8_t> values;
};

// Find what differs between the two copies of rows that ascend in position; false as soon as gaps and values have more
// than `limit` bytes. The item size is a power of two up to 16, and divides sizes and positions.
bool delta_encode(const DeltaRow* rows, size_t count, size_t itemsize, uint64_t limit, Delta& delta);

struct DeltaView {
  const uint8_t* gaps;
  size_t gaps_nbytes;
  const uint8_t* values;
  size_t count;
  size_t itemsize;
};

// Walk over all elements, and write them if wanted; false at the first that lies in no arena, or if the gaps are
// malformed. Trusts nothing that it reads, and never writes outside, even if the delta changes meanwhile.
bool delta_apply(const DeltaView& delta, const Arena* arenas, size_t count, bool write);

}  // namespace raynixl
