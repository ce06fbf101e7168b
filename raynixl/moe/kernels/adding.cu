// Sums of rows: the arithmetic of native/moe_reduce.cpp, bit for bit.
namespace {

constexpr u32 kF32 = 0, kBf16 = 1, kF16 = 2, kF64 = 3;
constexpr u32 kCanonical = 0x7FC00000u;

__device__ __forceinline__ u32 itemsize_of(u32 type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

template <u32 kType>
struct Of {
  using Raw = u16;
  using Wide = float;
};
template <>
struct Of<kF32> {
  using Raw = u32;
  using Wide = float;
};
template <>
struct Of<kF64> {
  using Raw = u64;
  using Wide = double;
};

template <u32 kType>
__device__ __forceinline__ typename Of<kType>::Wide widen(typename Of<kType>::Raw raw) {
  if constexpr (kType == kF64) return __longlong_as_double(i64(raw));
  else if constexpr (kType == kF32) return __uint_as_float(raw);
  else if constexpr (kType == kBf16) return __uint_as_float(u32(raw) << 16);
  else return widen_half(raw);
}

// Nothing is contracted: a product that is added without having been rounded would be other bits.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

// A sum rounded once to nearest even; NaNs are all alike.
__device__ __forceinline__ u32 narrow_bits(float value) { return value != value ? kCanonical : __float_as_uint(value); }

template <u32 kType, class Wide>
__device__ __forceinline__ typename Of<kType>::Raw narrow(Wide sum) {
  if constexpr (kType == kF64) {
    double value = sum;
    return value != value ? 0x7FF8000000000000ull : u64(__double_as_longlong(value));
  } else {
    u32 bits = narrow_bits(float(sum));
    if constexpr (kType == kF32) return bits;
    else if constexpr (kType == kBf16) return u16((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    else return bits == kCanonical ? 0x7E00 : narrow_half(__uint_as_float(bits));
  }
}

// 16 bytes of elements.
template <u32 kType>
struct Pack {
  static constexpr u32 kCount = 16 / sizeof(typename Of<kType>::Raw);
  typename Of<kType>::Raw raw[kCount];
};

template <u32 kType>
__device__ __forceinline__ Pack<kType> unpacked(const uint4& words) {
  u32 word[4] = {words.x, words.y, words.z, words.w};
  Pack<kType> pack;
#pragma unroll
  for (u32 k = 0; k < Pack<kType>::kCount; ++k) {
    if constexpr (kType == kF64) pack.raw[k] = u64(word[2 * k + 1]) << 32 | word[2 * k];
    else if constexpr (kType == kF32) pack.raw[k] = word[k];
    else pack.raw[k] = u16(word[k / 2] >> 16 * (k % 2));
  }
  return pack;
}

template <u32 kType>
__device__ __forceinline__ uint4 packed(const typename Of<kType>::Raw* raw) {
  if constexpr (kType == kF64) return {u32(raw[0]), u32(raw[0] >> 32), u32(raw[1]), u32(raw[1] >> 32)};
  else if constexpr (kType == kF32) return {raw[0], raw[1], raw[2], raw[3]};
  else
    return {raw[0] | u32(raw[1]) << 16, raw[2] | u32(raw[3]) << 16, raw[4] | u32(raw[5]) << 16, raw[6] | u32(raw[7]) << 16};
}

// Round `count` sums of kCount and store them from element `at` of a row on.
template <u32 kOut, u32 kCount, class Wide>
__device__ __forceinline__ void store_as(const Wide (&sums)[kCount], u64 row, u32 at, u32 count) {
  using Raw = typename Of<kOut>::Raw;
  constexpr u32 kEach = 16 / sizeof(Raw);
  Raw raw[kCount];
#pragma unroll
  for (u32 k = 0; k < kCount; ++k) raw[k] = narrow<kOut>(sums[k]);
  u64 to = row + u64(at) * sizeof(Raw);
  if (kCount >= kEach && count == kCount && to % 16 == 0) {
#pragma unroll
    for (u32 k = 0; k + kEach <= kCount; k += kEach) item<uint4>(to, k / kEach) = packed<kOut>(raw + k);
    return;
  }
#pragma unroll
  for (u32 k = 0; k < kCount; ++k)
    if (k < count) item<Raw>(to, k) = raw[k];
}

// float64 goes only with float64.
template <u32 kCount>
__device__ __forceinline__ void store(u32, const double (&sums)[kCount], u64 row, u32 at, u32 count) {
  store_as<kF64>(sums, row, at, count);
}
template <u32 kCount>
__device__ __forceinline__ void store(u32 type, const float (&sums)[kCount], u64 row, u32 at, u32 count) {
  if (type == kBf16) store_as<kBf16>(sums, row, at, count);
  else if (type == kF16) store_as<kF16>(sums, row, at, count);
  else store_as<kF32>(sums, row, at, count);
}

// What is added up for one row, by a warp: terms in order, in memory that its lanes share.
struct Terms {
  u64 rows[kTerms];
  float weights[kTerms];
};
struct Addition {
  const Terms* terms;
  u32 count;
  bool is_weighted, is_scaled;
  float scale;
  u32 hidden, out_dtype, bias_dtype, bias_count;
  u64 out, biases[2];

  __device__ __forceinline__ bool is_copy(u32 dtype) const {
    return count == 1 && out_dtype == dtype && !is_weighted && !is_scaled && bias_count == 0;
  }
};

template <u32 kBias, u32 kCount, class Wide>
__device__ __forceinline__ void add_bias_as(Wide (&sums)[kCount], u64 row, u32 at, u32 count, bool is_first) {
#pragma unroll
  for (u32 k = 0; k < kCount; ++k) {
    if (k >= count) continue;
    Wide term = Wide(widen<kBias>(item<typename Of<kBias>::Raw>(row, at + k)));
    sums[k] = is_first ? term : add(sums[k], term);
  }
}

template <u32 kCount, class Wide>
__device__ __forceinline__ void add_bias(u32 type, Wide (&sums)[kCount], u64 row, u32 at, u32 count, bool is_first) {
  switch (type) {
    case kF32: return add_bias_as<kF32>(sums, row, at, count, is_first);
    case kBf16: return add_bias_as<kBf16>(sums, row, at, count, is_first);
    case kF16: return add_bias_as<kF16>(sums, row, at, count, is_first);
    default: return add_bias_as<kF64>(sums, row, at, count, is_first);
  }
}

// What comes after the terms. A plain sum is of one dtype, and nothing does.
template <u32 kIn, bool kPlain, u32 kCount, class Wide>
__device__ __forceinline__ void finish_sums(const Addition& work, Wide (&sums)[kCount], u32 at, u32 count) {
  if constexpr (kPlain) return store_as<kIn>(sums, work.out, at, count);
  if (work.is_scaled && work.count != 0) {
#pragma unroll
    for (u32 k = 0; k < kCount; ++k) sums[k] = times(sums[k], Wide(work.scale));
  }
  for (u32 b = 0; b < work.bias_count; ++b)
    add_bias(work.bias_dtype, sums, work.biases[b], at, count, b == 0 && work.count == 0);
  store(work.out_dtype, sums, work.out, at, count);
}

// 16 bytes of a sum, of which `count` elements count; terms are aligned, and there is something behind them.
template <u32 kIn, bool kPlain>
__device__ __forceinline__ void add_pack(const Addition& work, u32 at, u32 count) {
  using Raw = typename Of<kIn>::Raw;
  using Wide = typename Of<kIn>::Wide;
  constexpr u32 kCount = Pack<kIn>::kCount, kAtOnce = 4;
  u64 offset = u64(at) * sizeof(Raw);
  if (work.is_copy(kIn)) {
    uint4 words = item<uint4>(work.terms->rows[0] + offset, 0);
    if ((work.out + offset) % 16 == 0 && count == kCount) {
      item<uint4>(work.out + offset, 0) = words;
      return;
    }
    Pack<kIn> pack = unpacked<kIn>(words);
#pragma unroll
    for (u32 k = 0; k < kCount; ++k)
      if (k < count) item<Raw>(work.out + offset, k) = pack.raw[k];
    return;
  }
  Wide sums[kCount];
#pragma unroll
  for (u32 k = 0; k < kCount; ++k) sums[k] = 0;
  for (u32 first = 0; first < work.count; first += kAtOnce) {
    uint4 words[kAtOnce];
#pragma unroll
    for (u32 j = 0; j < kAtOnce; ++j)
      if (first + j < work.count) words[j] = item<uint4>(work.terms->rows[first + j] + offset, 0);
#pragma unroll
    for (u32 j = 0; j < kAtOnce; ++j) {
      if (first + j >= work.count) continue;
      Pack<kIn> pack = unpacked<kIn>(words[j]);
      Wide weight = Wide(work.terms->weights[first + j]);
#pragma unroll
      for (u32 k = 0; k < kCount; ++k) {
        Wide term = widen<kIn>(pack.raw[k]);
        if (work.is_weighted) term = times(term, weight);
        sums[k] = first + j == 0 ? term : add(sums[k], term);
      }
    }
  }
  finish_sums<kIn, kPlain>(work, sums, at, count);
}

// One element of a sum, wherever its terms lie.
template <u32 kIn, bool kPlain>
__device__ __forceinline__ void add_element(const Addition& work, u32 at) {
  using Raw = typename Of<kIn>::Raw;
  using Wide = typename Of<kIn>::Wide;
  if (work.is_copy(kIn)) {
    item<Raw>(work.out, at) = item<Raw>(work.terms->rows[0], at);
    return;
  }
  Wide sums[1] = {0};
  for (u32 j = 0; j < work.count; ++j) {
    Wide term = widen<kIn>(item<Raw>(work.terms->rows[j], at));
    if (work.is_weighted) term = times(term, Wide(work.terms->weights[j]));
    sums[0] = j == 0 ? term : add(sums[0], term);
  }
  finish_sums<kIn, kPlain>(work, sums, at, 1);
}

// One of the pieces of a sum whose terms are aligned, and may be read beyond their end up to a multiple of 16 bytes.
template <u32 kIn, bool kPlain>
__device__ __noinline__ void add_up_packs(const Addition& given, u32 piece, u32 pieces, u32 lane) {
  const Addition work = given;  // in registers: what is stored cannot lie in it
  constexpr u32 kCount = Pack<kIn>::kCount;
  u32 packs = (work.hidden + kCount - 1) / kCount, each = (packs + pieces - 1) / pieces, first = piece * each;
  u32 last = first + each < packs ? first + each : packs;
  for (u32 pack = first + lane; pack < last; pack += kWarp) {
    u32 at = pack * kCount, left = work.hidden - at;
    add_pack<kIn, kPlain>(work, at, left < kCount ? left : kCount);
  }
}

// Likewise where they are not.
template <u32 kIn>
__device__ __noinline__ void add_up_elements(const Addition& given, u32 piece, u32 pieces, u32 lane) {
  const Addition work = given;
  for (u32 at = piece * kWarp + lane; at < work.hidden; at += pieces * kWarp) add_element<kIn, true>(work, at);
}

template <u32 kIn>
__device__ __forceinline__ void add_up_plain(const Addition& work, bool is_aligned, u32 piece, u32 pieces, u32 lane) {
  if (is_aligned) add_up_packs<kIn, true>(work, piece, pieces, lane);
  else add_up_elements<kIn>(work, piece, pieces, lane);
}

// Put the terms that are there of two candidates a lane, those of lanes first, then those of lanes + 32, side by side.
__device__ __forceinline__ u32 gather_terms(Terms& terms, const u64 (&rows)[2], const float (&weights)[2], u32 lane) {
  u32 count = 0;
  __syncwarp();
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    u32 there = __ballot_sync(kFull, rows[half] != 0);
    if (rows[half] != 0) {
      u32 place = count + __popc(there & ((1u << lane) - 1));
      terms.rows[place] = rows[half], terms.weights[place] = weights[half];
    }
    count += __popc(there);
  }
  __syncwarp();
  return count;
}

}  // namespace
