// Copies of rows, and how the warps of a CTA share them.
namespace {

template <class Unit, int kUnroll>
__device__ __forceinline__ void copy_units(u64 from, u64 to, u32 first, u32 last, u32 lane) {
  auto* source = reinterpret_cast<const Unit*>(from);
  auto* target = reinterpret_cast<Unit*>(to);
  for (u32 i = first + lane; i < last; i += kUnroll * kWarp) {
    Unit unit[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (i + k * kWarp < last) unit[k] = source[i + k * kWarp];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (i + k * kWarp < last) target[i + k * kWarp] = unit[k];
  }
}

template <class Unit, int kUnroll>
__device__ __forceinline__ void copy_piece(u64 from, u64 to, u32 nbytes, u32 piece, u32 pieces, u32 lane) {
  u32 units = nbytes / sizeof(Unit), each = (units + pieces - 1) / pieces, first = piece * each;
  copy_units<Unit, kUnroll>(from, to, first, first + each < units ? first + each : units, lane);
  if (piece == 0) copy_units<u8, 1>(from, to, units * u32(sizeof(Unit)), nbytes, lane);
}

// A warp copies one of the pieces of a span, of any alignment.
__device__ __forceinline__ void copy_span(u64 from, u64 to, u32 nbytes, u32 piece, u32 pieces, u32 lane) {
  u32 skew = u32(from | to) & 15;
  if (skew == 0) return copy_piece<uint4, 4>(from, to, nbytes, piece, pieces, lane);
  if (skew % 4 == 0) return copy_piece<u32, 4>(from, to, nbytes, piece, pieces, lane);
  copy_piece<u8, 4>(from, to, nbytes, piece, pieces, lane);
}

__device__ __forceinline__ void clear_span(u64 to, u32 nbytes, u32 piece, u32 pieces, u32 lane) {
  if (to % 16 == 0 && nbytes % 16 == 0) {
    for (u32 i = piece * kWarp + lane; i < nbytes / 16; i += pieces * kWarp) item<uint4>(to, i) = uint4{0, 0, 0, 0};
  } else {
    for (u32 i = piece * kWarp + lane; i < nbytes; i += pieces * kWarp) item<u8>(to, i) = 0;
  }
}

// How the warps of a CTA share `count` rows: each row is cut into pieces if there are fewer rows than warps.
struct Share {
  u32 pieces, items;
};
__device__ __forceinline__ Share share_of(u32 count) {
  u32 warps = blockDim.x / kWarp, pieces = count == 0 || count >= warps ? 1 : warps / count;
  if (pieces > 8) pieces = 8;
  return {pieces, count * pieces};
}

// Of `count` rows, how many have a number that is `part` modulo `parts`.
__device__ __forceinline__ u32 rows_of_part(u32 count, u32 part, u32 parts) {
  return count > part ? (count - part + parts - 1) / parts : 0;
}

// Prefix sums over a CTA: what the threads before have; `total` is what all have. All threads come here.
__device__ __forceinline__ u32 before_in_cta(u32 value, u32* total) {
  __shared__ u32 sums[kWarp];
  u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, up_to = value;
  for (u32 k = 1; k < kWarp; k *= 2) {
    u32 other = __shfl_up_sync(kFull, up_to, k);
    if (lane >= k) up_to += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) sums[warp] = up_to;
  __syncthreads();
  u32 before = up_to - value, all = 0;
  for (u32 k = 0; k < blockDim.x / kWarp; ++k) {
    if (k < warp) before += sums[k];
    all += sums[k];
  }
  *total = all;
  return before;
}

}  // namespace
