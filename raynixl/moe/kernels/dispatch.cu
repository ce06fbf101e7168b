// Dispatch: rows to their holders, and out of the window there.
namespace {

// Send

constexpr u32 kList = 2 * kThreads;

__device__ __forceinline__ i64 id_of(const Send& a, u64 pair) {
  return a.ids_nbytes == 8 ? item<i64>(a.ids, pair) : i64(item<i32>(a.ids, pair));
}

__device__ __forceinline__ void send_row(const Send& a, const Scene& scene, u32 rank, u32 token, u64 to, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp;
  for (u32 c = 0; c < a.columns_count; ++c) {
    const Column& column = a.columns[c];
    copy_span(column.address + token * column.stride, to + column.at, column.nbytes, piece, pieces, lane);
  }
  if (piece != 0) return;
  for (u32 k = lane; k < a.topk; k += kWarp) {
    u64 pair = u64(token) * a.topk + k;
    i64 id = id_of(a, pair);
    bool is_here = id >= 0 && id < i64(a.experts) && item<i32>(a.holders, id) == i32(rank);
    if (a.ids_at != kNowhere) item<i32>(to + a.ids_at, k) = is_here ? item<i32>(a.local, id) : -1;
    if (a.weights_at != kNowhere) item<float>(to + a.weights_at, k) = is_here ? item<float>(a.weights, pair) : 0.0f;
  }
  if (a.token_at != kNowhere && lane == 0) item<i32>(to + a.token_at, 0) = i32(token);
}

// What a CTA notes while it looks through the tokens.
struct Sending {
  u32 tokens[kList];
  u32 loads[kLocalExperts];
};

// Look at a token's experts. Returns whether one of them is the rank's.
__device__ __forceinline__ bool look_at_token(const Send& a, const Scene& scene, u32 rank, u32 token, u32* loads, bool notes,
                                              bool& is_wrong) {
  bool is_here = false;
  for (u32 k = 0; k < a.topk; ++k) {
    u64 pair = u64(token) * a.topk + k;
    i64 id = id_of(a, pair);
    i32 holder = kNotChosen;
    if (id < -1 || id >= i64(a.experts)) is_wrong = true;
    else if (id >= 0) {
      holder = item<i32>(a.holders, id);
      if (u32(holder) >= kRanks || has(scene.absent, u32(holder))) holder = kNobody;
      if (holder == i32(rank)) {
        is_here = true;
        u32 local = loads == nullptr ? a.loads_count : u32(item<i32>(a.local, id));
        if (local < a.loads_count) atomicAdd(&loads[local], 1u);
      }
    }
    if (notes && a.holder_of != 0) item<i32>(a.holder_of, pair) = holder;
  }
  return is_here;
}

// Rows of one rank, those whose number is `part` modulo `parts`.
__device__ __forceinline__ void send_part(const Send& a, const Scene& scene, u32 rank, u32 part, u32 parts, u32 unit, u32 units) {
  __shared__ Sending sending;
  bool is_there = !has(scene.absent, rank), is_wrong = false;
  u64 window = scene.layer->windows[rank], rows = rows_of(scene, window, scene.me);
  u32 count = 0, listed = 0, first = part, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Layer* layer = scene.layer;
  bool fits = a.tokens <= layer->capacity && u64(a.tokens) * a.row_nbytes <= layer->in_nbytes;
  u32 tokens = a.status == kFine && fits ? a.tokens : 0;
  bool counts_loads = part == 0 && is_there && a.loads_count != 0;
  __syncthreads();
  for (u32 k = threadIdx.x; counts_loads && k < a.loads_count; k += blockDim.x) sending.loads[k] = 0;
  __syncthreads();
  for (u32 start = 0; start < tokens || listed != 0; start += blockDim.x) {
    if (start < tokens) {
      u32 token = start + threadIdx.x, total;
      bool notes = start / blockDim.x % units == unit, is_here = false;
      if (token < tokens)
        is_here = look_at_token(a, scene, rank, token, counts_loads ? sending.loads : nullptr, notes, is_wrong) && is_there;
      u32 row = count + before_in_cta(is_here, &total);
      if (part == 0 && token < tokens && a.row_of != 0) item<i32>(a.row_of, u64(token) * a.ranks + rank) = is_here ? i32(row) : -1;
      if (is_here && row % parts == part) sending.tokens[(row - first) / parts] = token;
      count += total;
      listed = rows_of_part(count, part, parts) - (first - part) / parts;
      if (start + blockDim.x < tokens && listed + blockDim.x <= kList) continue;
    }
    __syncthreads();
    Share share = share_of(listed);
    for (u32 i = warp; i < share.items; i += warps) {
      u32 number = i / share.pieces;
      u64 to = rows + u64(first + number * parts) * a.row_nbytes;
      send_row(a, scene, rank, sending.tokens[number], to, i % share.pieces, share.pieces);
    }
    first += listed * parts, listed = 0;
    __syncthreads();
  }
  is_wrong = __syncthreads_or(is_wrong);
  if (part == 0 && threadIdx.x == 0 && a.sent != 0) item<i32>(a.sent, rank) = is_wrong ? 0 : i32(count);
  if (!is_there) return;
  for (u32 k = threadIdx.x; counts_loads && k < a.loads_count; k += blockDim.x)
    item<u32>(loads_of(scene, window, scene.me), k) = sending.loads[k];
  u32 status = a.status != kFine ? a.status : is_wrong || !fits ? kRange : kFine;
  finish_line(scene, rank, parts, status == kFine ? count : 0, status, a.signature, false);
}

// Take

// Where the rows of one source begin in what is taken, and how many there shall be.
struct Span {
  u32 begin, rows;
};

__device__ __forceinline__ Span span_of(const Scene& scene, const Seen& seen, u64 expected, u32 is_packed, u32 source) {
  if (!is_packed) return {source * scene.layer->capacity, seen.counts[source]};
  u32 begin = 0;
  for (u32 rank = 0; rank < source; ++rank) begin += expected != 0 ? u32(item<i32>(expected, rank)) : seen.counts[rank];
  return {begin, expected != 0 ? u32(item<i32>(expected, source)) : seen.counts[source]};
}

__device__ __forceinline__ void put_id(const Take& a, u64 pair, i32 id) {
  if (a.row_ids != 0) item<i32>(a.row_ids, pair) = id;
  if (a.ids == 0) return;
  if (a.ids_nbytes == 8) item<i64>(a.ids, pair) = id;
  else item<i32>(a.ids, pair) = id;
}

__device__ __forceinline__ void put_weight(const Take& a, u64 pair, float weight) {
  if (a.weights != 0) item<float>(a.weights, pair) = weight;
  if (a.row_weights != 0) item<float>(a.row_weights, pair) = weight;
}

// What is not a column. `from` is 0 where the row did not come.
__device__ __forceinline__ void take_fields(const Take& a, u64 from, u64 row, u32 lane) {
  for (u32 k = lane; k < a.topk; k += kWarp) {
    u64 pair = row * a.topk + k;
    if (a.ids_at != kNowhere) {
      i32 id = from == 0 ? -1 : item<i32>(from + a.ids_at, k);
      put_id(a, pair, id >= 0 && u32(id) < a.loads_count ? id : -1);
    }
    if (a.weights_at == kNowhere) continue;
    float weight = from == 0 ? 0.0f : item<float>(from + a.weights_at, k);
    put_weight(a, pair, weight);
    if (a.positions == 0 || a.place_weights == 0) continue;
    i32 place = item<i32>(a.positions, pair);
    if (place >= 0) item<float>(a.place_weights, place) = weight;
  }
  if (a.token_at != kNowhere && a.tokens != 0 && lane == 0)
    item<i32>(a.tokens, row) = from == 0 ? -1 : item<i32>(from + a.token_at, 0);
}

__device__ __forceinline__ void take_row(const Take& a, u64 from, u64 row, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp;
  for (u32 c = 0; c < a.columns_count; ++c) {
    const Column& column = a.columns[c];
    for (u32 k = 0; k < (a.positions != 0 ? a.topk : 1); ++k) {
      i64 place = a.positions != 0 ? i64(item<i32>(a.positions, row * a.topk + k)) : i64(row);
      if (place < 0) continue;
      u64 to = column.address + u64(place) * column.stride;
      if (from == 0) clear_span(to, column.nbytes, piece, pieces, lane);
      else copy_span(from + column.at, to, column.nbytes, piece, pieces, lane);
    }
  }
  if (piece == 0) take_fields(a, from, row, lane);
}

// Of fixed places, those that no row has come to.
__device__ __forceinline__ void blank_rest(const Take& a, u32 begin, u32 count, u32 capacity, u32 part, u32 parts) {
  u64 start = u64(begin) + count, rows = capacity - count, step = u64(parts) * blockDim.x;
  for (u64 i = u64(part) * blockDim.x + threadIdx.x; i < rows * a.topk; i += step) {
    if (a.ids_at != kNowhere) put_id(a, start * a.topk + i, -1);
    if (a.weights_at != kNowhere) put_weight(a, start * a.topk + i, 0.0f);
  }
  if (a.token_at == kNowhere || a.tokens == 0) return;
  for (u64 i = u64(part) * blockDim.x + threadIdx.x; i < rows; i += step) item<i32>(a.tokens, start + i) = -1;
}

__device__ __forceinline__ void take_part(const Take& a, const Scene& scene, const Seen& seen, u32 source, u32 part, u32 parts) {
  Span span = span_of(scene, seen, a.expected, a.is_packed, source);
  u32 came = seen.counts[source], warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  u64 rows = rows_of(scene, scene.window, source);
  Share share = share_of(rows_of_part(span.rows, part, parts));
  for (u32 i = warp; i < share.items; i += warps) {
    u32 number = part + i / share.pieces * parts;
    u64 from = number < came ? rows + u64(number) * a.row_nbytes : 0;
    take_row(a, from, u64(span.begin) + number, i % share.pieces, share.pieces);
  }
  if (!a.is_packed) blank_rest(a, span.begin, came, scene.layer->capacity, part, parts);
  if (part == 0 && threadIdx.x == 0 && a.counts != 0) item<i32>(a.counts, source) = i32(span.rows);
}

}  // namespace

extern "C" {

// A CTA for each part of each rank's rows: it looks through the tokens, and copies what is its own.
__global__ void __launch_bounds__(kThreads, 2) raynixl_moe_send(const __grid_constant__ Send a) {
  Scene scene = scene_of(a.layer, kDispatch);
  note_beginning(scene);
  u32 parts = gridDim.x / a.ranks > 0 ? gridDim.x / a.ranks : 1, units = parts * a.ranks;
  for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x)
    send_part(a, scene, (scene.me + 1 + unit) % a.ranks, unit / a.ranks, parts, unit, units);
}

// A CTA for each part of each source's rows: waits for their line, unless that has been done, and copies them out.
__global__ void __launch_bounds__(kThreads, 2) raynixl_moe_take(const __grid_constant__ Take a) {
  __shared__ Seen seen;
  Scene scene = scene_of(a.layer, kDispatch);
  Look look = {a.signature, a.deadline, 0, scene.layer->capacity, a.waits};
  u32 parts = gridDim.x / a.ranks > 0 ? gridDim.x / a.ranks : 1, units = parts * a.ranks;
  for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
    u32 source = unit % a.ranks;
    look_for(scene, look, a.is_packed ? ~0ull : bit(source), seen);
    take_part(a, scene, seen, source, unit / a.ranks, parts);
  }
  if (!is_last(scene)) return;
  look_for(scene, look, ~0ull, seen);
  for (u32 e = threadIdx.x; a.experts != 0 && e < a.loads_count; e += blockDim.x) item<i64>(a.experts, e) = load_of(scene, seen, e);
  add_waits(scene, seen, a.waited, a.waited_count);
  end_operation(scene, seen);
}

}  // extern "C"
