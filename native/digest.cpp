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
#endif

using AddWords = void (*)(DigestSum&, const char*, size_t, size_t);

AddWords choose_add_words() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return add_words_avx2;
#endif
  return add_words;
}

// Add up bytes that begin at an offset of a block and stay in it. Bytes of a word that are not there count as 0.
void add_bytes(AddWords add, DigestSum& sum, const char* from, size_t nbytes, size_t offset) {
  if (size_t skew = offset % 4; skew != 0) {
    size_t part = std::min(4 - skew, nbytes);
    uint32_t word = 0;
    std::memcpy(reinterpret_cast<char*>(&word) + skew, from, part);
    add_word(sum, word, offset / 4);
    from += part, nbytes -= part, offset += part;
  }
  if (nbytes == 0) return;
  size_t words = nbytes / 4, rest = nbytes % 4;
  add(sum, from, words, offset / 4);
  if (rest == 0) return;
  uint32_t word = 0;
  std::memcpy(&word, from + 4 * words, rest);
  add_word(sum, word, offset / 4 + words);
}

}  // namespace

void digest_rows(const DigestRow* rows, size_t count, DigestSum* sums, uint64_t seed) {
  static const AddWords add = choose_add_words();
  const uint64_t keys[2] = {mix(seed ^ kLaneSeeds[0]), mix(seed ^ kLaneSeeds[1])};
  for (const DigestRow* row = rows; row != rows + count; ++row) {
    auto* from = reinterpret_cast<const char*>(row->address);
    DigestSum& sum = sums[row->index];
    uint64_t nbytes = row->nbytes, position = row->position;
    while (nbytes > 0) {
      size_t offset = position % kBlock, part = std::min<uint64_t>(kBlock - offset, nbytes);
      DigestSum block = {};
      add_bytes(add, block, from, part, offset);
      uint64_t number = (position / kBlock + 1) * kGolden;
      sum.lanes[0] += block.lanes[0] * (mix(keys[0] + number) | 1);
      sum.lanes[1] += block.lanes[1] * (mix(keys[1] + number) | 1);
      from += part, nbytes -= part, position += part;
    }
  }
}

}  // namespace raynixl
