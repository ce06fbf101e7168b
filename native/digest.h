// The digest of weights: a sum over 32-bit words, each times two numbers that say where it stands.
//
// Word i of an image stands in block i / 1024 at place i % 1024. Its digest has two lanes, each the sum over all blocks
// of factor(lane, seed, block) times the sum over the block of constant(lane, place) times word, modulo 2^64. As it is
// linear, the digests of disjoint ranges add up to that of what they cover, in whatever order and by whomever they are
// made. A constant times the change of one word is below 2^64 and not 0, and a factor is odd, so no change of a single
// word is lost, nor a swap of two in a block. raynixl/native/twin_digest.py is the same in numpy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace raynixl {

struct DigestRow {
  uint64_t address;
  uint64_t nbytes;
  uint64_t position;  // bytes from the image's start
  uint64_t index;     // of the sum that it is added to
};

struct DigestSum {
  uint64_t lanes[2];
};

// Add the digest of each row to sums[row.index].
// Copy bytes and digest them in one pass over the source: `position` is that of the first. The copy goes past the caches
// if `stream`, and whoever waits for it needs a stream_fence().
struct CopyRow {
  uint64_t source;
  uint64_t destination;
  uint64_t nbytes;
  uint64_t position;
  uint64_t index;
};

void digest_copy(const CopyRow* rows, size_t count, DigestSum* sums, uint64_t seed, bool stream);

void digest_rows(const DigestRow* rows, size_t count, DigestSum* sums, uint64_t seed);

}  // namespace raynixl
