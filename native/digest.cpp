#include "digest.h"

#include <cstring>

#include <algorithm>
#include <array>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace raynixl {

namespace {

constexpr size_t kPlaces = 1024;
constexpr size_t kBlock = 4 * kPlaces;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr uint64_t kLaneSeeds[2] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B};

// splitmix64's way to scatter a number.
constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct Constants {
  alignas(64) uint32_t lanes[2][kPlaces] = {};

  constexpr Constants() {
    for (size_t place = 0; place < kPlaces; ++place) {
      uint64_t x = mix((place + 1) * kGolden);
      lanes[0][place] = uint32_t(x), lanes[1][place] = uint32_t(x >> 32);
    }
  }
};

constexpr Constants kConstants;

void add_word(DigestSum& sum, uint64_t word, size_t place) {
  sum.lanes[0] += word * kConstants.lanes[0][place];
  sum.lanes[1] += word * kConstants.lanes[1][place];
}

// Add up whole words that begin at a place and stay in its block.
void add_words(DigestSum& sum, const char* from, size_t words, size_t place) {
  DigestSum local = sum;
  for (size_t i = 0; i < words; ++i) {
    uint32_t word;
    std::memcpy(&word, from + 4 * i, 4);
    add_word(local, word, place + i);
  }
  sum = local;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t across(__m256i a, __m256i b) {
  alignas(32) uint64_t parts[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), _mm256_add_epi64(a, b));
  return parts[0] + parts[1] + parts[2] + parts[3];
}

__attribute__((target("avx2"))) void add_words_avx2(DigestSum& sum, const char* from, size_t words, size_t place) {
  const uint32_t* first = kConstants.lanes[0] + place;
  const uint32_t* second = kConstants.lanes[1] + place;
  __m256i even0 = _mm256_setzero_si256(), odd0 = even0, even1 = even0, odd1 = even0;
  size_t i = 0;
  for (; i + 8 <= words; i += 8) {
    __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 4 * i));
    __m256i k0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i));
    __m256i k1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i));
    __m256i odd = _mm256_srli_epi64(word, 32);
    even0 = _mm256_add_epi64(even0, _mm256_mul_epu32(word, k0));
    even1 = _mm256_add_epi64(even1, _mm256_mul_epu32(word, k1));
    odd0 = _mm256_add_epi64(odd0, _mm256_mul_epu32(odd, _mm256_srli_epi64(k0, 32)));
    odd1 = _mm256_add_epi64(odd1, _mm256_mul_epu32(odd, _mm256_srli_epi64(k1, 32)));
  }
  sum.lanes[0] += across(even0, odd0), sum.lanes[1] += across(even1, odd1);
  add_words(sum, from + 4 * i, words - i, place + i);
}

// Whole words that are copied on their way. Where they go to need not be aligned; 2 KiB ahead is fetched, since the
// hardware stops at the ends of pages of 4 KiB (Zen 4, two threads: 22 GB/s without, 29 with).
template <bool stream>
__attribute__((target("avx2"))) void copy_words_avx2(DigestSum& sum, char* to, const char* from, size_t words,
                                                     size_t place) {
  constexpr size_t kAhead = 2048;
  const uint32_t* first = kConstants.lanes[0] + place;
  const uint32_t* second = kConstants.lanes[1] + place;
  __m256i even0 = _mm256_setzero_si256(), odd0 = even0, even1 = even0, odd1 = even0;
  size_t i = 0;
  for (; i + 8 <= words; i += 8) {
    if (i % 16 == 0) _mm_prefetch(from + 4 * i + kAhead, _MM_HINT_T0);
    __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 4 * i));
    auto* out = reinterpret_cast<__m256i*>(to + 4 * i);
    if constexpr (stream) {
      _mm256_stream_si256(out, word);
    } else {
      _mm256_storeu_si256(out, word);
    }
    __m256i k0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i));
    __m256i k1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i));
    __m256i odd = _mm256_srli_epi64(word, 32);
    even0 = _mm256_add_epi64(even0, _mm256_mul_epu32(word, k0));
    even1 = _mm256_add_epi64(even1, _mm256_mul_epu32(word, k1));
    odd0 = _mm256_add_epi64(odd0, _mm256_mul_epu32(odd, _mm256_srli_epi64(k0, 32)));
    odd1 = _mm256_add_epi64(odd1, _mm256_mul_epu32(odd, _mm256_srli_epi64(k1, 32)));
  }
  sum.lanes[0] += across(even0, odd0), sum.lanes[1] += across(even1, odd1);
  std::memcpy(to + 4 * i, from + 4 * i, 4 * (words - i));
  add_words(sum, from + 4 * i, words - i, place + i);
}

// Streams where the destination is aligned from some word of the first 8 on.
__attribute__((target("avx2"))) void copy_words_avx2(DigestSum& sum, char* to, const char* from, size_t words,
                                                     size_t place, bool stream) {
  size_t skew = -reinterpret_cast<uintptr_t>(to) & 31;
  if (!stream || skew % 4 != 0 || words < skew / 4 + 8) {
    return copy_words_avx2<false>(sum, to, from, words, place);
  }
  size_t head = skew / 4;
  std::memcpy(to, from, skew);
  add_words(sum, from, head, place);
  copy_words_avx2<true>(sum, to + skew, from + skew, words - head, place + head);
}
#endif

void copy_words(DigestSum& sum, char* to, const char* from, size_t words, size_t place, bool) {
  std::memcpy(to, from, 4 * words);
  add_words(sum, from, words, place);
}

using CopyWords = void (*)(DigestSum&, char*, const char*, size_t, size_t, bool);

CopyWords choose_copy_words() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return copy_words_avx2;
#endif
  return copy_words;
}

using AddWords = void (*)(DigestSum&, const char*, size_t, size_t);

AddWords choose_add_words() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return add_words_avx2;
#endif
  return add_words;
}

// Hand bytes that begin at an offset of a block and stay in it on in words. `whole(offset in the bytes, words, place)`
// takes those that are all there; bytes of a word that are not there count as 0.
template <class Whole>
void add_bytes(DigestSum& sum, const char* from, size_t nbytes, size_t offset, Whole whole) {
  size_t done = 0;
  if (size_t skew = offset % 4; skew != 0) {
    done = std::min(4 - skew, nbytes);
    uint32_t word = 0;
    std::memcpy(reinterpret_cast<char*>(&word) + skew, from, done);
    add_word(sum, word, offset / 4);
  }
  size_t words = (nbytes - done) / 4, place = (offset + done) / 4;
  if (words > 0) whole(done, words, place);
  done += 4 * words;
  if (done == nbytes) return;
  uint32_t word = 0;
  std::memcpy(&word, from + done, nbytes - done);
  add_word(sum, word, place + words);
}

// Go through a row of bytes at `position` block by block: `add(sum of the block, offset in the row, nbytes, offset in
// the block)`.
template <class Add>
void add_blocks(DigestSum& sum, const uint64_t (&keys)[2], uint64_t position, uint64_t nbytes, Add add) {
  for (uint64_t done = 0; done < nbytes;) {
    size_t offset = position % kBlock, part = std::min<uint64_t>(kBlock - offset, nbytes - done);
    DigestSum block = {};
    add(block, done, part, offset);
    uint64_t number = (position / kBlock + 1) * kGolden;
    sum.lanes[0] += block.lanes[0] * (mix(keys[0] + number) | 1);
    sum.lanes[1] += block.lanes[1] * (mix(keys[1] + number) | 1);
    done += part, position += part;
  }
}

}  // namespace

void digest_rows(const DigestRow* rows, size_t count, DigestSum* sums, uint64_t seed) {
  static const AddWords add = choose_add_words();
  const uint64_t keys[2] = {mix(seed ^ kLaneSeeds[0]), mix(seed ^ kLaneSeeds[1])};
  for (const DigestRow* row = rows; row != rows + count; ++row) {
    auto* from = reinterpret_cast<const char*>(row->address);
    add_blocks(sums[row->index], keys, row->position, row->nbytes,
               [&](DigestSum& block, uint64_t at, size_t part, size_t offset) {
                 add_bytes(block, from + at, part, offset, [&](size_t skip, size_t words, size_t place) {
                   add(block, from + at + skip, words, place);
                 });
               });
  }
}

void digest_copy(const CopyRow* rows, size_t count, DigestSum* sums, uint64_t seed, bool stream) {
  static const CopyWords copy = choose_copy_words();
  const uint64_t keys[2] = {mix(seed ^ kLaneSeeds[0]), mix(seed ^ kLaneSeeds[1])};
  for (const CopyRow* row = rows; row != rows + count; ++row) {
    auto* from = reinterpret_cast<const char*>(row->source);
    auto* to = reinterpret_cast<char*>(row->destination);
    add_blocks(sums[row->index], keys, row->position, row->nbytes,
               [&](DigestSum& block, uint64_t at, size_t part, size_t offset) {
                 size_t head = 0, words = 0;
                 add_bytes(block, from + at, part, offset, [&](size_t skip, size_t count, size_t place) {
                   head = skip, words = count;
                   copy(block, to + at + skip, from + at + skip, count, place, stream);
                 });
                 std::memcpy(to + at, from + at, head);
                 size_t done = head + 4 * words;
                 std::memcpy(to + at + done, from + at + done, part - done);
               });
  }
}

}  // namespace raynixl
