// Combine: what goes back to the sources, and what they add up.
namespace {

// Give

// Returns whether a pair's row is beyond those of y, which none of the warp reads then.
__device__ __forceinline__ bool sum_pairs(const Give& a, u64 row, u64 to, Terms& terms, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp;
  bool is_wrong = false;
  u64 rows[2] = {0, 0};
  float weights[2] = {1.0f, 1.0f};
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    u32 k = lane + half * kWarp;
    if (k >= a.topk) continue;
    i32 place = item<i32>(a.pairs, row * a.topk + k);
    if (place < 0) continue;
    is_wrong |= u32(place) >= a.y_rows;
    rows[half] = a.y + u64(place) * a.y_stride;
    if (a.weights != 0) weights[half] = item<float>(a.weights, row * a.topk + k);
  }
  if (__ballot_sync(kFull, is_wrong) != 0) return true;
  Addition work = {};
  work.terms = &terms, work.count = gather_terms(terms, rows, weights, lane), work.is_weighted = a.weights != 0;
  work.hidden = a.hidden, work.out_dtype = a.dtype, work.out = to;
  bool is_aligned = (a.y | a.y_stride | u64(a.hidden) * itemsize_of(a.dtype)) % 16 == 0;
  switch (a.dtype) {
    case kF32: add_up_plain<kF32>(work, is_aligned, piece, pieces, lane); break;
    case kBf16: add_up_plain<kBf16>(work, is_aligned, piece, pieces, lane); break;
    case kF16: add_up_plain<kF16>(work, is_aligned, piece, pieces, lane); break;
    default: add_up_plain<kF64>(work, is_aligned, piece, pieces, lane);
  }
  return false;
}

// Returns whether y has not the rows that are wanted.
__device__ __forceinline__ bool give_item(const Give& a, u64 row, u32 number, u64 items, Terms& terms, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp, nbytes = a.hidden * itemsize_of(a.dtype);
  if (a.mode == kGivePairs) {
    for (u32 k = 0; k < a.topk; ++k) {
      u64 pair = row * a.topk + k, to = items + (u64(number) * a.topk + k) * a.item_nbytes;
      i32 place = item<i32>(a.pairs, pair);
      if (place < 0) continue;
      if (u32(place) >= a.y_rows) return true;
      copy_span(a.y + u64(place) * a.y_stride, to, nbytes, piece, pieces, lane);
      if (a.beside_at != kNowhere && piece == 0 && lane == 0) item<float>(to + a.beside_at, 0) = item<float>(a.beside, pair);
    }
    return false;
  }
  u64 to = items + u64(number) * a.item_nbytes;
  bool is_wrong = a.mode == kSums ? sum_pairs(a, row, to, terms, piece, pieces) : row >= a.y_rows;
  if (a.mode != kSums && !is_wrong) copy_span(a.y + row * a.y_stride, to, nbytes, piece, pieces, lane);
  for (u32 k = lane; !is_wrong && a.beside_at != kNowhere && piece == 0 && k < a.topk; k += kWarp)
    item<float>(to + a.beside_at, k) = item<float>(a.beside, row * a.topk + k);
  return is_wrong;
}

// Have our own host hear that this call of ours was refused, whichever ranks have heard of it.
__device__ __forceinline__ void tell_wrong(const Scene& scene) {
  auto* page = reinterpret_cast<volatile Page*>(scene.layer->page);
  page->refusals[scene.me] = scene.number * kStatuses + kConfig;
  __threadfence_system();
  page->refused = 2 * scene.number;
}

__device__ __forceinline__ void give_part(const Give& a, const Scene& scene, u32 rank, u32 part, u32 parts) {
  __shared__ Terms terms[kWarps];
  if (has(scene.absent, rank)) return;
  u32 begin = rank * scene.layer->capacity, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  u32 count = a.counts != 0 && a.status == kFine ? u32(item<i32>(a.counts, rank)) : 0;
  u64 items_count = u64(count) * (a.mode == kGivePairs ? a.topk : 1);
  bool fits = count <= scene.layer->capacity && items_count * a.item_nbytes <= scene.layer->back_nbytes;
  if (a.is_packed) {
    begin = 0;
    for (u32 other = 0; count != 0 && other < rank; ++other) begin += u32(item<i32>(a.counts, other));
  }
  u64 items = items_of(scene, scene.layer->windows[rank], scene.me);
  Share share = share_of(rows_of_part(fits ? count : 0, part, parts));
  bool is_wrong = false;
  for (u32 i = warp; i < share.items; i += warps) {
    u32 number = part + i / share.pieces * parts;
    is_wrong |= give_item(a, u64(begin) + number, number, items, terms[warp], i % share.pieces, share.pieces);
  }
  is_wrong = __syncthreads_or(is_wrong);
  if (is_wrong && threadIdx.x == 0) tell_wrong(scene);
  finish_line(scene, rank, parts, count, fits ? a.status : kRange, a.signature, is_wrong);
}

// Sum

// Where a pair, or a holder's row, of a token lies; 0 if it did not come. `k` counts pairs, or ranks.
struct Backs {
  const Sum& a;
  const Scene& scene;
  u64 usable;

  __device__ __forceinline__ u64 of_holder(u64 token, u32 holder) const {
    i32 row = item<i32>(a.row_of, token * a.ranks + holder);
    if (row < 0 || !has(usable, holder)) return 0;
    return items_of(scene, scene.window, holder) + u64(row) * a.item_nbytes;
  }
  __device__ __forceinline__ u64 of_pair(u64 token, u32 k) const {
    i32 holder = item<i32>(a.holder_of, token * a.topk + k);
    if (holder < 0 || !has(usable, u32(holder))) return 0;
    i32 row = item<i32>(a.row_of, token * a.ranks + holder);
    if (row < 0) return 0;
    return items_of(scene, scene.window, u32(holder)) + (u64(row) * a.topk + k) * a.item_nbytes;
  }
  // Whether the holder of a pair has sent anything.
  __device__ __forceinline__ bool has_come(u64 token, u32 k) const {
    i32 holder = item<i32>(a.holder_of, token * a.topk + k);
    return holder >= 0 && has(usable, u32(holder)) && item<i32>(a.row_of, token * a.ranks + holder) >= 0;
  }
};

// The sum of up to kTerms numbers in the order in which numpy adds up a row: one after the other if they are fewer than 8,
// else in 8 sums.
struct RowSum {
  float sums[8];
  u32 count;

  __device__ __forceinline__ void of(const float* numbers, u32 n) {
    count = n < 8 ? 1 : 8;
    u32 whole = n < 8 ? 0 : n - n % 8;
#pragma unroll
    for (u32 j = 0; j < 8; ++j) sums[j] = j < count && n >= 8 ? numbers[j] : 0.0f;
    for (u32 i = 8; i < whole; i += 8) {
#pragma unroll
      for (u32 j = 0; j < 8; ++j) sums[j] = add(sums[j], numbers[i + j]);
    }
    if (n >= 8)
      sums[0] = add(add(add(sums[0], sums[1]), add(sums[2], sums[3])), add(add(sums[4], sums[5]), add(sums[6], sums[7])));
    for (u32 i = whole; i < n; ++i) sums[0] = add(sums[0], numbers[i]);
  }
};

// Whether terms of a token are missing, and what makes up for them: all its weights over those that count.
__device__ __forceinline__ bool is_scaled(const Backs& backs, u64 token, Terms& terms, float& scale) {
  const Sum& a = backs.a;
  u32 lane = threadIdx.x % kWarp;
  bool is_missing = false;
  float* numbers = terms.weights;
  RowSum whole, rest;
  for (u32 turn = 0; turn < 2; ++turn) {
    __syncwarp();
    for (u32 k = lane; k < a.topk; k += kWarp) {
      u64 pair = token * a.topk + k;
      bool is_chosen = item<i32>(a.holder_of, pair) != kNotChosen, is_there = is_chosen && backs.has_come(token, k);
      is_missing |= is_chosen && !is_there;
      float weight = a.weights != 0 ? item<float>(a.weights, pair) : 1.0f;
      numbers[k] = (turn == 0 ? is_chosen : is_there) ? weight : 0.0f;
    }
    __syncwarp();
    (turn == 0 ? whole : rest).of(numbers, a.topk);
  }
  __syncwarp();
  scale = rest.sums[0] == 0.0f ? 1.0f : __fdiv_rn(whole.sums[0], rest.sums[0]);
  return __ballot_sync(kFull, is_missing) != 0;
}

__device__ __forceinline__ void put_weights_back(const Backs& backs, u64 token, u32 lane) {
  const Sum& a = backs.a;
  for (u32 k = lane; k < a.topk; k += kWarp) {
    float weight = 0.0f;
    if (backs.has_come(token, k)) {
      u64 holder = u64(item<i32>(a.holder_of, token * a.topk + k));
      if (a.mode == kRows) weight = item<float>(backs.of_holder(token, u32(holder)) + a.beside_at, k);
      else weight = item<float>(backs.of_pair(token, k) + a.beside_at, 0);
    }
    item<float>(a.out_weights, token * a.topk + k) = weight;
  }
}

__device__ __forceinline__ void sum_row(const Backs& backs, u64 row, Terms& terms, u32 piece, u32 pieces) {
  const Sum& a = backs.a;
  u32 lane = threadIdx.x % kWarp;
  u64 token = a.mode == kApart ? row / a.topk : row;
  u64 rows[2] = {0, 0};
  float weights[2] = {1.0f, 1.0f};
  Addition work = {};
  if (a.renormalises && a.mode != kApart) work.is_scaled = is_scaled(backs, token, terms, work.scale);
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    u32 k = lane + half * kWarp;
    if (a.mode == kRows) {
      if (k < a.ranks) rows[half] = backs.of_holder(token, k);
    } else if (k < a.topk && (a.mode != kApart || k == row % a.topk)) {
      rows[half] = backs.of_pair(token, k);
      if (a.weights != 0 && a.mode != kApart) weights[half] = item<float>(a.weights, token * a.topk + k);
    }
  }
  work.terms = &terms, work.count = gather_terms(terms, rows, weights, lane);
  work.is_weighted = a.weights != 0 && a.mode != kRows && a.mode != kApart;
  work.hidden = a.hidden, work.out_dtype = a.out_dtype, work.bias_dtype = a.bias_dtype, work.bias_count = a.bias_count;
  work.out = a.out + row * a.out_stride;
#pragma unroll
  for (u32 b = 0; b < 2; ++b) work.biases[b] = a.biases[b] + token * a.bias_strides[b];
  switch (a.dtype) {
    case kF32: add_up_packs<kF32, false>(work, piece, pieces, lane); break;
    case kBf16: add_up_packs<kBf16, false>(work, piece, pieces, lane); break;
    case kF16: add_up_packs<kF16, false>(work, piece, pieces, lane); break;
    default: add_up_packs<kF64, false>(work, piece, pieces, lane);
  }
  if (a.out_weights != 0 && piece == 0 && (a.mode != kApart || row % a.topk == 0)) put_weights_back(backs, token, lane);
}

__device__ __forceinline__ u64 usable_of(const Scene& scene, const Seen& seen) {
  u64 usable = seen.came;
  for (u32 rank = 0; rank < scene.ranks; ++rank)
    if (seen.status[rank] != kFine) usable &= ~bit(rank);
  return usable;
}

}  // namespace

extern "C" {

// A CTA for each part of the rows that go back to each source.
__global__ void __launch_bounds__(kThreads, 2) raynixl_moe_give(const __grid_constant__ Give a) {
  Scene scene = scene_of(a.layer, kCombine);
  note_beginning(scene);
  u32 parts = gridDim.x / a.ranks > 0 ? gridDim.x / a.ranks : 1, units = parts * a.ranks;
  for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) give_part(a, scene, (scene.me + 1 + unit) % a.ranks, unit / a.ranks, parts);
}

// Waits for the lines of all holders, unless that has been done. A warp adds up a token, or a piece of it.
__global__ void __launch_bounds__(kThreads, 2) raynixl_moe_sum(const __grid_constant__ Sum a) {
  __shared__ Seen seen;
  __shared__ Terms terms[kWarps];
  Scene scene = scene_of(a.layer, kCombine);
  look_for(scene, {a.signature, a.deadline, a.sent, kNowhere, a.waits}, ~0ull, seen);
  Backs backs = {a, scene, usable_of(scene, seen)};
  u32 warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  u64 rows = a.mode == kApart ? u64(a.tokens) * a.topk : a.tokens, all = u64(gridDim.x) * warps;
  u32 most = (a.hidden * itemsize_of(a.dtype) / 16 + kWarp - 1) / kWarp;
  u32 pieces = rows == 0 || rows >= all ? 1 : u32(all / rows);
  if (pieces > most) pieces = most > 0 ? most : 1;
  for (u64 i = u64(blockIdx.x) * warps + warp; i < rows * pieces; i += all)
    sum_row(backs, i / pieces, terms[warp], u32(i % pieces), pieces);
  if (!is_last(scene)) return;
  add_waits(scene, seen, a.waited, a.waited_count);
  end_operation(scene, seen);
}

}  // extern "C"
