// The kernels of the nvlink backend: block lists, their end, digests of weights, and FP8 in blocks.
//
// Compiled at run time by NVRTC (nvlink_kernel.py), for the GPU that is there. All addresses are plain numbers.
// A kernel that ends a piece of work says so by `finish`: the last CTA to come writes a number to a word of pinned host
// memory, which whoever waits looks at. All that the kernel wrote is visible to everybody before that.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Set anew by tools/gpu_tune.py.
#ifndef CTAS
#define CTAS 3  // of 256 threads on a multiprocessor at least: bounds the registers
#endif
#ifndef UNROLL
#define UNROLL 8  // words of 16 bytes that a thread has in flight
#endif

namespace {

constexpr u32 kWarp = 32;

// By hand: addresses are numbers, of which the compiler does not know that they are of global memory, and of 16 bytes of
// which not all are used it would load parts, one by one.
#if !defined(__CUDA_ARCH__)
__device__ __forceinline__ uint4 load(const uint4* from) { return *from; }
__device__ __forceinline__ void store(uint4* to, uint4 word) { *to = word; }
#else
#if defined(HINT_STREAM)
#define HINT ".cs"
#else
#define HINT ""
#endif
__device__ __forceinline__ uint4 load(const uint4* from) {
  uint4 word;
  asm volatile("ld.global" HINT ".v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}
__device__ __forceinline__ void store(uint4* to, uint4 word) {
  asm volatile("st.global" HINT ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#endif

// What a kernel does last. `counter` is for one kernel at a time: [0] CTAs that have come, [1] ends so far, which
// are what is written where no number is given (a graph that is replayed cannot have one).
struct End {
  volatile u64* flag;
  u64 sequence;
  u32* counter;
};

__device__ __forceinline__ void finish(const End& end) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (gridDim.x > 1) {
    if (atomicAdd(end.counter, 1u) != gridDim.x - 1) return;
    end.counter[0] = 0;  // for the next kernel, which begins when this one has ended
    __threadfence_system();
  }
  u64 number = end.sequence;
  if (number == 0) number = ++end.counter[1];
  *end.flag = number;
}

// Copy `count` words of 16 bytes, both aligned. `width` threads work on it, this one is the `lane`-th.
template <int kUnroll>
__device__ __forceinline__ void copy_words(const uint4* from, uint4* to, u32 count, u32 lane, u32 width) {
  u32 i = lane;
#pragma unroll 1
  for (; i + (kUnroll - 1) * width < count; i += kUnroll * width) {
    uint4 word[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) word[k] = load(from + i + k * width);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) store(to + i + k * width, word[k]);
  }
  if (i >= count) return;
  uint4 word[kUnroll] = {};  // or they would take registers everywhere, for what they were before
#pragma unroll
  for (int k = 0; k < kUnroll; ++k)
    if (i + k * width < count) word[k] = load(from + i + k * width);
#pragma unroll
  for (int k = 0; k < kUnroll; ++k)
    if (i + k * width < count) store(to + i + k * width, word[k]);
}

// The 16 bytes that begin `4 * kSkip + shift / 8` bytes after `low`, and go on in `high`.
template <int kSkip>
__device__ __forceinline__ uint4 shifted(const uint4& low, const uint4& high, u32 shift) {
  const u32 word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint4 out;
  out.x = __funnelshift_r(word[kSkip], word[kSkip + 1], shift);
  out.y = __funnelshift_r(word[kSkip + 1], word[kSkip + 2], shift);
  out.z = __funnelshift_r(word[kSkip + 2], word[kSkip + 3], shift);
  out.w = __funnelshift_r(word[kSkip + 3], word[kSkip + 4], shift);
  return out;
}

// Likewise, but what is wanted begins `4 * kSkip + shift / 8` bytes after `from`: word i is made of words i and i + 1.
template <int kUnroll, int kSkip>
__device__ __forceinline__ void copy_shifted(const uint4* from, uint4* to, u32 count, u32 shift, u32 lane, u32 width) {
  u32 i = lane;
#pragma unroll 1
  for (; i + (kUnroll - 1) * width < count; i += kUnroll * width) {
    uint4 low[kUnroll], high[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      low[k] = load(from + i + k * width), high[k] = load(from + i + k * width + 1);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) store(to + i + k * width, shifted<kSkip>(low[k], high[k], shift));
  }
  if (i >= count) return;
  uint4 low[kUnroll] = {}, high[kUnroll] = {};
#pragma unroll
  for (int k = 0; k < kUnroll; ++k)
    if (i + k * width < count) low[k] = load(from + i + k * width), high[k] = load(from + i + k * width + 1);
#pragma unroll
  for (int k = 0; k < kUnroll; ++k)
    if (i + k * width < count) store(to + i + k * width, shifted<kSkip>(low[k], high[k], shift));
}

__device__ __forceinline__ void copy_bytes(u64 from, u64 to, u64 count, u32 lane, u32 width) {
  for (u64 i = lane; i < count; i += width) reinterpret_cast<u8*>(to)[i] = reinterpret_cast<const u8*>(from)[i];
}

// Copy a span of any alignment, of less than 32 GiB. Nothing outside of the source is read, nothing outside of the target written.
template <int kUnroll>
__device__ __forceinline__ void copy_span(u64 from, u64 to, u64 nbytes, u32 lane, u32 width) {
  u64 head = -to & 15;
  u32 skew = u32(from + head) & 15;  // of the source where the target is aligned
  if (skew == 0) {
    if (head > nbytes) head = nbytes;
    u32 words = u32((nbytes - head) / 16);
    u64 done = head + 16 * u64(words);
    copy_bytes(from, to, head, lane, width);
    copy_words<kUnroll>(reinterpret_cast<const uint4*>(from + head), reinterpret_cast<uint4*>(to + head), words, lane,
                        width);
    copy_bytes(from + done, to + done, nbytes - done, lane, width);
    return;
  }
  if (nbytes < 64) return copy_bytes(from, to, nbytes, lane, width);
  if (head < skew) head += 16;  // so that the first aligned word that is read is within the source
  u32 words = u32((nbytes - head + skew - 16) / 16);
  u64 done = head + 16 * u64(words);
  auto* source = reinterpret_cast<const uint4*>(from + head - skew);
  auto* target = reinterpret_cast<uint4*>(to + head);
  u32 shift = 8 * (skew & 3);
  constexpr int kShifted = kUnroll >= 4 ? kUnroll / 4 : 1;
  copy_bytes(from, to, head, lane, width);
  switch (skew / 4) {
    case 0: copy_shifted<kShifted, 0>(source, target, words, shift, lane, width); break;
    case 1: copy_shifted<kShifted, 1>(source, target, words, shift, lane, width); break;
    case 2: copy_shifted<kShifted, 2>(source, target, words, shift, lane, width); break;
    default: copy_shifted<kShifted, 3>(source, target, words, shift, lane, width); break;
  }
  copy_bytes(from + done, to + done, nbytes - done, lane, width);
}

// `width` threads of a warp take one row after the other; rows of (source, target, nbytes).
template <int kUnroll>
__device__ __forceinline__ void copy_rows(const u64* rows, u64 count, u32 width) {
  u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  u64 step = u64(gridDim.x) * blockDim.x / width;
  u32 lane = threadIdx.x % width;
  for (u64 row = thread / width; row < count; row += step)
    copy_span<kUnroll>(rows[3 * row], rows[3 * row + 1], rows[3 * row + 2], lane, width);
}

}  // namespace

extern "C" {

// A single span, by one CTA: for what is small.
__global__ void __launch_bounds__(1024) raynixl_copy_small(u64 from, u64 to, u64 nbytes, u64* flag, u64 sequence, u32* counter) {
  copy_span<UNROLL>(from, to, nbytes, threadIdx.x, blockDim.x);
  finish({flag, sequence, counter});
}

// A single span, in tiles of `tile` bytes, whose bounds are multiples of 128 bytes of the target. A tile is a warp's.
__global__ void __launch_bounds__(256, CTAS) raynixl_copy_range(u64 from, u64 to, u64 nbytes, u64 tile, u64* flag, u64 sequence, u32* counter) {
  u64 first = (-to & 127) + tile;
  u64 step = u64(gridDim.x) * blockDim.x / kWarp;
  for (u64 number = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;; number += step) {
    u64 start = number == 0 ? 0 : first + (number - 1) * tile;
    if (start >= nbytes) break;
    u64 until = first + number * tile;
    copy_span<UNROLL>(from + start, to + start, (until < nbytes ? until : nbytes) - start, threadIdx.x % kWarp, kWarp);
  }
  finish({flag, sequence, counter});
}

// Rows of (source, target, nbytes), a warp for each.
__global__ void __launch_bounds__(256, CTAS) raynixl_copy_tiles(const u64* rows, u64 count, u64* flag, u64 sequence, u32* counter) {
  copy_rows<UNROLL>(rows, count, kWarp);
  finish({flag, sequence, counter});
}

// Likewise for rows of a few hundred bytes: 8 threads for each.
__global__ void __launch_bounds__(256, CTAS) raynixl_copy_narrow(const u64* rows, u64 count, u64* flag, u64 sequence, u32* counter) {
  copy_rows<UNROLL / 2>(rows, count, 8);
  finish({flag, sequence, counter});
}

// Nothing, but its end: everything before it on the stream is done.
__global__ void raynixl_signal(u64* flag, u64 sequence, u32* counter) { finish({flag, sequence, counter}); }

}  // extern "C"

namespace {

constexpr u32 kPlaces = 1024;
constexpr u64 kBlock = 4 * kPlaces;
constexpr u64 kGolden = 0x9E3779B97F4A7C15ull;

__device__ __forceinline__ u64 mix(u64 x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// The word at an address of which the bytes from `start` to `end` are there; others count as 0.
__device__ __forceinline__ u32 word_at(u64 address, u64 start, u64 end) {
  if (address >= start && address + 4 <= end) {
    u32 skew = address & 3;
    if (skew == 0) return *reinterpret_cast<const u32*>(address);
    u64 aligned = address - skew;
    if (aligned >= start && aligned + 8 <= end) {
      auto* words = reinterpret_cast<const u32*>(aligned);
      return __funnelshift_r(words[0], words[1], 8 * skew);
    }
  }
  u32 word = 0;
  for (u32 k = 0; k < 4; ++k)
    if (address + k >= start && address + k < end) word |= u32(*reinterpret_cast<const u8*>(address + k)) << (8 * k);
  return word;
}

__device__ __forceinline__ u64 sum_of_warp(u64 value) {
  for (u32 k = kWarp / 2; k > 0; k /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, k);
  return value;
}

struct Lanes {
  u64 first, second;
};

// A lane's part of the sum over one block, whose first byte would lie at `base`; it has bytes from `start` to `end`.
__device__ __forceinline__ Lanes digest_block(const u32 (&constants)[2][kPlaces], u64 base, u64 start, u64 end,
                                              u32 lane) {
  Lanes sum = {0, 0};
  if ((base & 15) == 0 && start <= base && base + kBlock <= end) {
    constexpr u32 kAtOnce = 4;
#pragma unroll
    for (u32 k = 0; k < kPlaces / 4; k += kAtOnce * kWarp) {
      uint4 words[kAtOnce];
#pragma unroll
      for (u32 j = 0; j < kAtOnce; ++j) words[j] = load(reinterpret_cast<const uint4*>(base) + k + j * kWarp + lane);
#pragma unroll
      for (u32 j = 0; j < kAtOnce; ++j) {
        uint4 word = words[j];
        uint4 one = reinterpret_cast<const uint4*>(constants[0])[k + j * kWarp + lane];
        uint4 two = reinterpret_cast<const uint4*>(constants[1])[k + j * kWarp + lane];
        sum.first += u64(word.x) * one.x + u64(word.y) * one.y + u64(word.z) * one.z + u64(word.w) * one.w;
        sum.second += u64(word.x) * two.x + u64(word.y) * two.y + u64(word.z) * two.z + u64(word.w) * two.w;
      }
    }
    return sum;
  }
#pragma unroll 4
  for (u32 place = lane; place < kPlaces; place += kWarp) {
    u64 address = base + 4 * place;
    if (address + 4 <= start || address >= end) continue;
    u64 word = word_at(address, start, end);
    sum.first += word * constants[0][place], sum.second += word * constants[1][place];
  }
  return sum;
}

}  // namespace

extern "C" {

// Rows of (address, nbytes, position, index, number of the first tile), none of them empty: native/digest.h. A tile is
// what of a row lies between two multiples of `tile` bytes in position, at most 32 blocks; a warp takes one after the
// other. `sums` are zeros before and afterwards; what they come to goes to `out`, in pinned memory of the host.
__global__ void __launch_bounds__(256, 3) raynixl_digest(const u64* rows, u64 count, u64 tiles, u64 tile, u64* sums,
                                                      u64* out, u64 sums_count, u64 first_key, u64 second_key,
                                                      u64* flag, u64 sequence, u32* counter) {
  constexpr u32 kNear = 64;
  alignas(16) __shared__ u32 constants[2][kPlaces];
  __shared__ u64 near[5 * kNear];  // rows may lie in the host
  __shared__ bool is_last;
  for (u32 place = threadIdx.x; place < kPlaces; place += blockDim.x) {
    u64 scattered = mix((place + 1) * kGolden);
    constants[0][place] = u32(scattered), constants[1][place] = u32(scattered >> 32);
  }
  const u64* table = rows;
  if (count <= kNear) {
    for (u32 i = threadIdx.x; i < 5 * count; i += blockDim.x) near[i] = rows[i];
    table = near;
  }
  __syncthreads();
  u32 lane = threadIdx.x % kWarp;
  u64 step = u64(gridDim.x) * blockDim.x / kWarp;
  for (u64 t = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; t < tiles; t += step) {
    u64 low = 0, high = count;
    while (high - low > 1) {
      u64 middle = (low + high) / 2;
      if (table[5 * middle + 4] <= t) low = middle; else high = middle;
    }
    const u64* row = table + 5 * low;
    u64 bound = (row[2] / tile + (t - row[4])) * tile;
    u64 skip = bound > row[2] ? bound - row[2] : 0;
    u64 position = row[2] + skip, left = row[1] - skip, room = tile - (position - bound);
    u64 start = row[0] + skip, until = start + (left < room ? left : room), index = row[3];
    u64 number = position / kBlock, base = start - position % kBlock;
    u64 mine = (number + lane + 1) * kGolden;  // each lane makes the factors of one block for all
    u64 first_factor = mix(first_key + mine) | 1, second_factor = mix(second_key + mine) | 1;
    Lanes sum = {0, 0};
    u32 blocks = u32((until - base + kBlock - 1) / kBlock);
    for (u32 k = 0; k < blocks; ++k) {
      Lanes block = digest_block(constants, base + k * kBlock, start, until, lane);
      sum.first += block.first * __shfl_sync(0xFFFFFFFFu, first_factor, k);
      sum.second += block.second * __shfl_sync(0xFFFFFFFFu, second_factor, k);
    }
    sum.first = sum_of_warp(sum.first), sum.second = sum_of_warp(sum.second);
    if (lane == 0) atomicAdd(sums + 2 * index, sum.first), atomicAdd(sums + 2 * index + 1, sum.second);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (u64 i = threadIdx.x; i < 2 * sums_count; i += blockDim.x) out[i] = atomicExch(sums + i, 0ull);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  counter[0] = 0;
  __threadfence_system();
  *reinterpret_cast<volatile u64*>(flag) = sequence;
}

}  // extern "C"

namespace {

constexpr u32 kSide = 128;

// Types of 16 bits by hand, so that no header is needed.
struct Bfloat {
  u16 bits;
};
struct Half {
  u16 bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bfloat value) { return __uint_as_float(u32(value.bits) << 16); }
__device__ __forceinline__ float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// The e4m3 nearest to a number, the even one of two; what is 480 or more, or no number, is NaN.
__device__ __forceinline__ u8 narrow(float value) {
  u32 bits = __float_as_uint(value);
  u8 sign = u8(bits >> 24) & 0x80;
  bits &= 0x7FFFFFFFu;
  if (bits >= 0x43F00000u) return sign | 0x7F;                                              // 480
  if (bits < 0x3C800000u) return sign | u8(__float2uint_rn(__uint_as_float(bits) * 512.0f));  // 2^-6: multiples of 2^-9
  bits += 0x7FFFFu + (bits >> 20 & 1);  // to 3 bits after the point
  return sign | u8((bits - 0x3C000000u) >> 20);
}

// The larger of two magnitudes as bits: NaN is the largest.
__device__ __forceinline__ u32 magnitude(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

// A block of 128 x 128, or what an edge leaves of it.
struct Block {
  u64 first;  // value of its upper left corner
  u32 height, width;
};

__device__ __forceinline__ Block block_of_cta(u64 rows, u64 columns) {
  u64 down = (rows + kSide - 1) / kSide, across = (columns + kSide - 1) / kSide;
  u64 matrix = blockIdx.x / (down * across), inside = blockIdx.x % (down * across);
  u64 top = inside / across * kSide, left = inside % across * kSide;
  return {matrix * rows * columns + top * columns + left, u32(rows - top < kSide ? rows - top : kSide),
          u32(columns - left < kSide ? columns - left : kSide)};
}

// The scale of a block from the largest magnitudes, as bits, that its threads have seen.
__device__ __forceinline__ float scale_of_cta(u32 most, float* scales) {
  __shared__ u32 largest[kWarp];
  for (u32 k = kWarp / 2; k > 0; k /= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, k));
  if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = most;
  __syncthreads();
  for (u32 k = 0; k < blockDim.x / kWarp; ++k) most = max(most, largest[k]);
  float scale = __fdiv_rn(__uint_as_float(most), 448.0f);
  if (scale == 0.0f) scale = 1.0f;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  return scale;
}

// Value k of 16 bytes.
template <class Value>
__device__ __forceinline__ float value_at(const uint4& words, u32 k);
template <>
__device__ __forceinline__ float value_at<float>(const uint4& words, u32 k) {
  return __uint_as_float(k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w);
}
__device__ __forceinline__ u16 half_at(const uint4& words, u32 k) {
  u32 word = k / 2 == 0 ? words.x : k / 2 == 1 ? words.y : k / 2 == 2 ? words.z : words.w;
  return u16(word >> 16 * (k % 2));
}
template <>
__device__ __forceinline__ float value_at<Bfloat>(const uint4& words, u32 k) {
  return widen(Bfloat{half_at(words, k)});
}
template <>
__device__ __forceinline__ float value_at<Half>(const uint4& words, u32 k) {
  return widen(Half{half_at(words, k)});
}

// 16 bytes at a time, read once and kept: rows must begin at multiples of that.
template <class Value>
__device__ __forceinline__ void quantise_words(const Value* source, u8* stored, float* scales, u64 rows, u64 columns) {
  constexpr u32 kWide = 16 / sizeof(Value), kChunks = kSide / kWide, kStep = 256 / kChunks, kPasses = kSide / kStep;
  Block block = block_of_cta(rows, columns);
  u32 column = threadIdx.x % kChunks * kWide, row = threadIdx.x / kChunks;
  bool is_inside = column < block.width;
  uint4 words[kPasses];
  u32 most = 0;
#pragma unroll
  for (u32 pass = 0; pass < kPasses; ++pass) {
    if (!is_inside || row + pass * kStep >= block.height) continue;
    words[pass] = load(reinterpret_cast<const uint4*>(source + block.first + (row + pass * kStep) * columns + column));
#pragma unroll
    for (u32 k = 0; k < kWide; ++k) most = max(most, magnitude(value_at<Value>(words[pass], k)));
  }
  float scale = scale_of_cta(most, scales);
#pragma unroll
  for (u32 pass = 0; pass < kPasses; ++pass) {
    if (!is_inside || row + pass * kStep >= block.height) continue;
    u32 packed[2] = {0, 0};
#pragma unroll
    for (u32 k = 0; k < kWide; ++k)
      packed[k / 4] |= u32(narrow(__fdiv_rn(value_at<Value>(words[pass], k), scale))) << 8 * (k % 4);
    u8* to = stored + block.first + (row + pass * kStep) * columns + column;
    if (kWide == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
    } else {
      *reinterpret_cast<u32*>(to) = packed[0];
    }
  }
}

template <class Value>
__device__ __forceinline__ void quantise(const Value* source, u8* stored, float* scales, u64 rows, u64 columns) {
  constexpr u32 kWide = 16 / sizeof(Value);
  if (columns % kWide == 0 && u64(source) % 16 == 0 && u64(stored) % kWide == 0)
    return quantise_words(source, stored, scales, rows, columns);
  Block block = block_of_cta(rows, columns);
  u32 column = threadIdx.x % kSide, step = blockDim.x / kSide;
  u32 most = 0;
  if (column < block.width)
    for (u32 row = threadIdx.x / kSide; row < block.height; row += step)
      most = max(most, magnitude(widen(source[block.first + row * columns + column])));
  float scale = scale_of_cta(most, scales);
  if (column >= block.width) return;
  for (u32 row = threadIdx.x / kSide; row < block.height; row += step) {
    u64 at = block.first + row * columns + column;
    stored[at] = narrow(__fdiv_rn(widen(source[at]), scale));
  }
}

}  // namespace

extern "C" {

// One CTA of 256 threads for each block of 128 x 128: its scale, and its values over that as e4m3.
__global__ void __launch_bounds__(256) raynixl_quantise_float32(const float* source, u8* stored, float* scales,
                                                                u64 rows, u64 columns) {
  quantise(source, stored, scales, rows, columns);
}

__global__ void __launch_bounds__(256) raynixl_quantise_bfloat16(const Bfloat* source, u8* stored, float* scales,
                                                                 u64 rows, u64 columns) {
  quantise(source, stored, scales, rows, columns);
}

__global__ void __launch_bounds__(256) raynixl_quantise_float16(const Half* source, u8* stored, float* scales,
                                                                u64 rows, u64 columns) {
  quantise(source, stored, scales, rows, columns);
}

}  // extern "C"
