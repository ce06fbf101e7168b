#include "delta.h"

#include <cstring>

#include <algorithm>
#include <bit>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace raynixl {

namespace {

constexpr size_t kBlock = 64;        // bytes compared into one mask
constexpr size_t kStretch = 4096;    // bytes whose changes are listed before they are written
constexpr size_t kBatch = 64;        // elements fetched into the cache together before they are overwritten
constexpr size_t kMaxGap = 9;
constexpr uint8_t kGap16 = 253, kGap32 = 254, kGap64 = 255;

// Set bit i of each mask if byte i of that block differs.
using Compare = void (*)(const char*, const char*, size_t, uint64_t*);

uint64_t compare_bytes(const char* a, const char* b, size_t nbytes) {
  uint64_t differing = 0;
  for (size_t i = 0; i < nbytes; ++i) differing |= uint64_t(a[i] != b[i]) << i;
  return differing;
}

void compare(const char* a, const char* b, size_t blocks, uint64_t* masks) {
  for (size_t i = 0; i < blocks; ++i, a += kBlock, b += kBlock)
    masks[i] = std::memcmp(a, b, kBlock) == 0 ? 0 : compare_bytes(a, b, kBlock);
}

#if defined(__x86_64__)
__attribute__((target("avx2"), always_inline)) inline uint64_t same(const char* a, const char* b) {
  __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(left, right)));
}

__attribute__((target("avx2"))) void compare_avx2(const char* a, const char* b, size_t blocks, uint64_t* masks) {
  for (size_t i = 0; i < blocks; ++i, a += kBlock, b += kBlock) masks[i] = ~(same(a, b) | same(a + 32, b + 32) << 32);
}
#endif

Compare choose_compare() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return compare_avx2;
#endif
  return compare;
}

// Leave one bit of each element, its first, set if any of its bytes was.
template <size_t itemsize>
uint64_t by_element(uint64_t mask) {
  uint64_t firsts = ~uint64_t(0);
  if constexpr (itemsize >= 2) mask |= mask >> 1, firsts &= 0x5555555555555555;
  if constexpr (itemsize >= 4) mask |= mask >> 2, firsts &= 0x1111111111111111;
  if constexpr (itemsize >= 8) mask |= mask >> 4, firsts &= 0x0101010101010101;
  if constexpr (itemsize >= 16) mask |= mask >> 8, firsts &= 0x0001000100010001;
  return mask & firsts;
}

// List where elements begin that differ; returns how many. Four at a time are written whether there are so many or
// not, as a loop that ends at the last of them is mispredicted at every block.
template <size_t itemsize>
size_t list_changes(const uint64_t* masks, size_t blocks, uint16_t* offsets) {
  size_t count = 0;
  for (size_t i = 0; i < blocks; ++i) {
    if (i % 8 == 0 && i + 8 <= blocks) {
      uint64_t any = 0;
      for (size_t k = 0; k < 8; ++k) any |= masks[i + k];
      if (any == 0) {
        i += 7;
        continue;
      }
    }
    uint64_t mask = by_element<itemsize>(masks[i]);
    size_t found = size_t(std::popcount(mask)), base = i * kBlock;
    for (size_t k = 0; k < 4; ++k, mask &= mask - 1) offsets[count + k] = uint16_t(base + std::countr_zero(mask));
    for (size_t k = 4; k < found; ++k, mask &= mask - 1) offsets[count + k] = uint16_t(base + std::countr_zero(mask));
    count += found;
  }
  return count;
}

// Gaps and values that grow.
class Writer {
 public:
  explicit Writer(Delta& delta) : delta_(delta) {}

  // Add elements at these offsets of a stretch whose first element has this number.
  template <size_t itemsize>
  void add(const uint16_t* offsets, size_t count, uint64_t first, const char* stretch) {
    grow(delta_.gaps, gaps_, count * kMaxGap);
    grow(delta_.values, values_, count * itemsize);
    uint8_t* gaps = delta_.gaps.data() + gaps_;
    uint8_t* values = delta_.values.data() + values_;
    uint64_t next = next_;
    for (size_t i = 0; i < count; ++i) {
      uint64_t number = first + offsets[i] / itemsize;
      gaps = put_gap(gaps, number - next);
      next = number + 1;
      std::memcpy(values + i * itemsize, stretch + offsets[i], itemsize);
    }
    next_ = next;
    gaps_ = size_t(gaps - delta_.gaps.data());
    values_ += count * itemsize;
  }

  uint64_t nbytes() const { return gaps_ + values_; }

  void finish() { delta_.gaps.resize(gaps_), delta_.values.resize(values_); }

 private:
  static void grow(std::vector<uint8_t>& bytes, size_t used, size_t room) {
    if (bytes.size() < used + room) bytes.resize(2 * (used + room));
  }

  static uint8_t* put_gap(uint8_t* to, uint64_t gap) {
    if (gap < kGap16) {
      *to = uint8_t(gap);
      return to + 1;
    }
    size_t width = gap >> 16 == 0 ? 2 : gap >> 32 == 0 ? 4 : 8;
    *to = width == 2 ? kGap16 : width == 4 ? kGap32 : kGap64;
    std::memcpy(to + 1, &gap, width);
    return to + 1 + width;
  }

  Delta& delta_;
  uint64_t next_ = 0;
  size_t gaps_ = 0, values_ = 0;
};

template <size_t itemsize>
bool scan(const DeltaRow& row, uint64_t limit, Compare compare, Writer& writer) {
  auto* before = reinterpret_cast<const char*>(row.before);
  auto* after = reinterpret_cast<const char*>(row.after);
  uint64_t first = row.position / itemsize, masks[kStretch / kBlock];
  uint16_t offsets[kStretch + 4];
  for (uint64_t at = 0; at < row.nbytes; at += kStretch) {
    size_t part = std::min<uint64_t>(kStretch, row.nbytes - at), blocks = part / kBlock, rest = part % kBlock;
    compare(before + at, after + at, blocks, masks);
    if (rest != 0) {
      size_t whole = part - rest;
      masks[blocks++] = compare_bytes(before + at + whole, after + at + whole, rest);
    }
    size_t count = list_changes<itemsize>(masks, blocks, offsets);
    if (count == 0) continue;
    writer.add<itemsize>(offsets, count, first + at / itemsize, after + at);
    if (writer.nbytes() > limit) return false;
  }
  return true;
}

using Scan = bool (*)(const DeltaRow&, uint64_t, Compare, Writer&);

Scan scan_for(size_t itemsize) {
  switch (itemsize) {
    case 1: return scan<1>;
    case 2: return scan<2>;
    case 4: return scan<4>;
    case 8: return scan<8>;
    default: return scan<16>;
  }
}

// Reads gaps one after the other.
class Reader {
 public:
  Reader(const uint8_t* from, size_t nbytes) : at_(from), end_(from + nbytes) {}

  bool next(uint64_t& gap) {
    if (at_ == end_) return false;
    uint8_t code = *at_++;
    gap = code;
    if (code < kGap16) return true;
    size_t width = code == kGap16 ? 2 : code == kGap32 ? 4 : 8;
    if (size_t(end_ - at_) < width) return false;
    gap = 0;
    std::memcpy(&gap, at_, width);
    at_ += width;
    return true;
  }

  bool at_end() const { return at_ == end_; }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

// The numbers of the elements of one arena, and where it lies.
struct Span {
  uint64_t first = 0;
  uint64_t end = 0;
  uint64_t address = 0;
};

bool find(uint64_t number, size_t itemsize, const Arena* arenas, size_t count, Span& span) {
  if (number > UINT64_MAX / itemsize) return false;
  uint64_t arena = number * itemsize >> kArenaBit;
  if (arena >= count) return false;
  uint64_t whole = std::min(arenas[arena].nbytes, uint64_t(1) << kArenaBit) / itemsize;
  span.first = (arena << kArenaBit) / itemsize;
  span.end = span.first + whole;
  span.address = arenas[arena].address;
  return number < span.end;
}

template <size_t itemsize>
bool walk(const DeltaView& delta, const Arena* arenas, size_t count, bool write) {
  Reader gaps(delta.gaps, delta.gaps_nbytes);
  Span span;
  uint64_t next = 0, gap = 0;
  char* targets[kBatch];
  for (size_t done = 0; done < delta.count;) {
    size_t batch = std::min(kBatch, delta.count - done);
    for (size_t i = 0; i < batch; ++i) {
      if (!gaps.next(gap) || next + gap < next) return false;
      uint64_t number = next + gap;
      if ((number < span.first || number >= span.end) && !find(number, itemsize, arenas, count, span)) return false;
      next = number + 1;
      targets[i] = reinterpret_cast<char*>(span.address + (number - span.first) * itemsize);
      if (write) __builtin_prefetch(targets[i], 1);
    }
    const uint8_t* values = delta.values + done * itemsize;
    if (write)
      for (size_t i = 0; i < batch; ++i) std::memcpy(targets[i], values + i * itemsize, itemsize);
    done += batch;
  }
  return gaps.at_end();
}

}  // namespace

bool delta_encode(const DeltaRow* rows, size_t count, size_t itemsize, uint64_t limit, Delta& delta) {
  static const Compare compare = choose_compare();
  const Scan scan = scan_for(itemsize);
  Writer writer(delta);
  for (const DeltaRow* row = rows; row != rows + count; ++row)
    if (!scan(*row, limit, compare, writer)) return false;
  writer.finish();
  return true;
}

bool delta_apply(const DeltaView& delta, const Arena* arenas, size_t count, bool write) {
  switch (delta.itemsize) {
    case 1: return walk<1>(delta, arenas, count, write);
    case 2: return walk<2>(delta, arenas, count, write);
    case 4: return walk<4>(delta, arenas, count, write);
    case 8: return walk<8>(delta, arenas, count, write);
    default: return walk<16>(delta, arenas, count, write);
  }
}

}  // namespace raynixl
