// Order: where the pairs of each local expert lie, side by side.
namespace {

__device__ __forceinline__ u32 rounded_up(u32 count, u32 alignment) { return (count + alignment - 1) / alignment * alignment; }

// Where the ids of a row that has come lie.
struct Ids {
  u64 tables[kRanks];
  u32 begins[kRanks + 1], strides;

  __device__ __forceinline__ u64 of(u32 row) const {
    u32 source = 0;
    while (row >= begins[source + 1]) ++source;
    return tables[source] + u64(row - begins[source]) * strides;
  }
};

__device__ __forceinline__ void find_ids(const Order& a, const Scene& scene, const Seen& seen, Ids& ids) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 begin = 0;
    for (u32 rank = 0; rank < kRanks; ++rank) {
      bool is_kept = a.row_ids != 0;
      ids.begins[rank] = begin;
      ids.tables[rank] = is_kept ? a.row_ids + 4ull * begin * a.topk : rows_of(scene, scene.window, rank) + a.ids_at;
      begin += !is_kept ? seen.counts[rank] : rank < a.ranks ? u32(item<i32>(a.expected, rank)) : 0;
    }
    ids.begins[kRanks] = begin, ids.strides = a.row_ids != 0 ? 4 * a.topk : a.row_nbytes;
  }
  __syncthreads();
}

__device__ __forceinline__ void count_loads(const Order& a, const Scene& scene, const Seen& seen, const Ids& ids, u32* loads) {
  for (u32 e = threadIdx.x; e < a.local_experts; e += blockDim.x) loads[e] = a.row_ids != 0 ? 0 : load_of(scene, seen, e);
  __syncthreads();
  if (a.row_ids == 0) return;
  for (u32 pair = threadIdx.x; pair < ids.begins[kRanks] * a.topk; pair += blockDim.x) {
    i32 id = item<i32>(a.row_ids, pair);
    if (id >= 0 && u32(id) < a.local_experts) atomicAdd(&loads[id], 1u);
  }
  __syncthreads();
}

// Give the pairs of one expert their places, in order of (row, k), from `place` on; there are `count`.
__device__ __forceinline__ void order_expert(const Order& a, const Ids& ids, u32 expert, u32 place, u32 count) {
  u32 rows = ids.begins[kRanks], end = place + count;
  for (u32 start = 0; start < rows; start += blockDim.x) {
    u32 row = start + threadIdx.x, mine = 0, total;
    u64 table = row < rows ? ids.of(row) : 0;
    for (u32 k = 0; row < rows && k < a.topk; ++k) mine += item<i32>(table, k) == i32(expert);
    u32 next = place + before_in_cta(mine, &total);
    for (u32 k = 0; row < rows && k < a.topk; ++k) {
      i32 id = item<i32>(table, k);
      bool is_nobody = id < 0 || u32(id) >= a.local_experts;
      if (id == i32(expert)) item<i32>(a.positions, u64(row) * a.topk + k) = next < end ? i32(next) : -1, ++next;
      else if (is_nobody && expert == 0) item<i32>(a.positions, u64(row) * a.topk + k) = -1;
    }
    place += total;
  }
}

__device__ __forceinline__ void clear_places(const Order& a, u32 first, u32 last) {
  u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (u32 place = first + warp; place < last; place += warps) {
    for (u32 c = 0; c < a.columns_count; ++c)
      clear_span(a.columns[c].address + place * a.columns[c].stride, a.columns[c].nbytes, 0, 1, lane);
    if (a.place_weights != 0 && lane == 0) item<float>(a.place_weights, place) = 0.0f;
  }
}

}  // namespace

extern "C" {

// A CTA for each local expert, one at least: gives its pairs their places, and clears what lies between.
__global__ void __launch_bounds__(kThreads) raynixl_moe_order(const __grid_constant__ Order a) {
  __shared__ Seen seen;
  __shared__ Ids ids;
  __shared__ u32 loads[kLocalExperts], before;
  Scene scene = scene_of(a.layer, kDispatch);
  look_for(scene, {0, 0, 0, scene.layer->capacity, 0}, a.row_ids != 0 ? 0 : ~0ull, seen);
  find_ids(a, scene, seen, ids);
  count_loads(a, scene, seen, ids, loads);
  if (blockIdx.x == 0 && threadIdx.x == 0) item<i64>(a.offsets, 0) = 0;
  for (u32 expert = blockIdx.x; expert < a.local_experts; expert += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    for (u32 e = threadIdx.x; e < expert; e += blockDim.x) atomicAdd(&before, rounded_up(loads[e], a.alignment));
    __syncthreads();
    u32 place = before, count = loads[expert], end = place + rounded_up(count, a.alignment);
    if (threadIdx.x == 0) item<i64>(a.offsets, expert + 1) = end;
    order_expert(a, ids, expert, place, count);
    clear_places(a, place + count, end);
  }
}

}  // extern "C"
