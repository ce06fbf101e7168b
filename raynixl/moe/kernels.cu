// The kernels of expert parallelism on GPUs: rows go straight into a window of the peer's memory, a line behind them.
//
// Compiled at run time by NVRTC (cuda_kernel.py). Addresses are plain numbers, 0 is none. cuda_structs.py says what the
// structs mean, cuda_frame.py how a window is laid out.
//
// An operation is `send` and `take`, or `give` and `sum`; between them, `arrive` if the host wants to know what has come.
// All launches of a layer are in one order. No CTA waits for another one of its launch, so it does not matter how many
// of them run at a time; and whoever waits for a peer's line ends by the deadline. A side of a window is written again two
// operations later: the line of the one between says that its reader is through.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#ifdef __CUDACC__  // where this is compiled for the host, whoever includes it brings these along
namespace {

__device__ __forceinline__ u64 load_acquire(const u64* from) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(u64* to, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ __forceinline__ u64 nanoseconds() {
  u64 value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ float widen_half(u16 bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
}

__device__ __forceinline__ u16 narrow_half(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace
#endif

namespace {

constexpr u32 kWarp = 32, kRanks = 64, kColumns = 8, kLocalExperts = 2048, kTerms = 64, kLineNbytes = 64;
constexpr u32 kNowhere = 0xFFFFFFFFu, kFull = 0xFFFFFFFFu;
constexpr u32 kThreads = 512, kWarps = kThreads / kWarp;
constexpr u64 kMillisecond = 1000000;

constexpr u32 kDispatch = 0, kCombine = 1;
constexpr u32 kFine = 0, kRange = 1, kDiffers = 3, kDamaged = 4;  // of Refusal
constexpr u32 kSums = 1, kGivePairs = 2;                          // of Giving
constexpr u32 kRows = 0, kApart = 2;                              // of Summing
constexpr i32 kNotChosen = -1, kNobody = -2;

struct Column {
  u64 address, stride;
  u32 nbytes, at;
};
struct Line {
  u64 number, mask, signature;
  u32 count, status;
  u64 rest[4];
};
struct Waiting {
  u64 number, remaining;
};
struct Layer {
  u64 windows[kRanks];
  u64 lines_at[2], notices_at, waits_at, loads_at, in_at, back_at, in_nbytes, back_nbytes, page;
  u32 me, capacity, loads_width, ranks;
  u64 operation, turns[2], mask, masked, base, began, since, found, told, came;
  u64 verdicts[kRanks];  // 0: none so far, 1: came, 2: lost
  u32 counters[kRanks], ended, spare;
};
struct Page {
  u64 ticket, operation, turns[2], lost, masked, excused, refused;
  u32 status[kRanks], counts[kRanks], experts[kLocalExperts];
};
struct Send {
  u64 layer;
  Column columns[kColumns];
  u64 ids, weights, holders, local, row_of, holder_of, sent, signature;
  u32 columns_count, row_nbytes, ids_at, weights_at, token_at, ids_nbytes, tokens, topk, experts, loads_count, ranks, status;
};
struct Arrive {
  u64 layer, signature, deadline, ticket, sent;
  u32 kind, ranks, loads_count, spare;
};
struct Order {
  u64 layer;
  Column columns[kColumns];
  u64 row_ids, expected, positions, offsets, place_weights;
  u32 columns_count, row_nbytes, ids_at, topk, ranks, local_experts, alignment, spare;
};
struct Take {
  u64 layer;
  Column columns[kColumns];
  u64 ids, row_ids, weights, row_weights, tokens, counts, experts, expected, positions, place_weights, signature, deadline;
  u32 columns_count, row_nbytes, ids_at, weights_at, token_at, ids_nbytes, topk, ranks, loads_count, is_packed, waits, spare;
};
struct Give {
  u64 layer, y, y_stride, beside, pairs, weights, row_ids, counts, signature;
  u32 hidden, dtype, item_nbytes, beside_at, topk, ranks, mode, is_packed, status, spare;
};
struct Sum {
  u64 layer, row_of, holder_of, sent, weights, out, out_stride, biases[2], bias_strides[2], out_weights, signature, deadline;
  u32 tokens, topk, ranks, hidden, dtype, out_dtype, bias_dtype, bias_count, item_nbytes, beside_at, mode, renormalises, waits,
      spare;
};
struct Mask {
  u64 layer, mask;
};
static_assert(sizeof(Column) == 24 && sizeof(Line) == kLineNbytes && sizeof(Layer) == 1472 && sizeof(Page) == 8768, "");
static_assert(sizeof(Send) == 312 && sizeof(Arrive) == 56 && sizeof(Order) == 272 && sizeof(Take) == 344, "");
static_assert(sizeof(Give) == 112 && sizeof(Sum) == 168 && sizeof(Mask) == 16, "");

__device__ __forceinline__ u64 bit(u32 rank) { return 1ull << rank; }
__device__ __forceinline__ bool has(u64 ranks, u32 rank) { return ranks >> rank & 1; }
__device__ __forceinline__ u64 look_at(const u64* word) { return *reinterpret_cast<const volatile u64*>(word); }
template <class Value>
__device__ __forceinline__ Value& item(u64 address, u64 number) { return reinterpret_cast<Value*>(address)[number]; }

// What all CTAs of a launch begin with. Only what ends the operation changes it.
struct Scene {
  Layer* layer;
  u64 number;  // of this operation
  u64 absent;  // ranks that take no part: all, once we are masked
  u64 window;  // ours
  u32 kind, side, me;
};

__device__ __forceinline__ Scene scene_of(u64 address, u32 kind) {
  auto* layer = reinterpret_cast<Layer*>(address);
  u32 ranks = layer->ranks, me = layer->me;
  u64 absent = layer->masked ? ~0ull : layer->mask;
  if (ranks < kRanks) absent |= ~0ull << ranks;
  return {layer, layer->operation + 1, absent, layer->windows[me], kind, u32(layer->turns[kind] & 1), me};
}

__device__ __forceinline__ void note_beginning(const Scene& scene) {
  if (blockIdx.x == 0 && threadIdx.x == 0) scene.layer->began = nanoseconds();
}

__device__ __forceinline__ Line* line_of(const Scene& scene, u64 window, u32 source) {
  return reinterpret_cast<Line*>(window + scene.layer->lines_at[scene.kind] + (2 * source + scene.side) * kLineNbytes);
}
__device__ __forceinline__ u64 loads_of(const Scene& scene, u64 window, u32 source) {
  return window + scene.layer->loads_at + 4ull * (2 * source + scene.side) * scene.layer->loads_width;
}
__device__ __forceinline__ u64 rows_of(const Scene& scene, u64 window, u32 source) {
  return window + scene.layer->in_at + (2 * source + scene.side) * scene.layer->in_nbytes;
}
__device__ __forceinline__ u64 items_of(const Scene& scene, u64 window, u32 holder) {
  return window + scene.layer->back_at + (2 * holder + scene.side) * scene.layer->back_nbytes;
}

// Copies

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

// Lines

// The last CTA of all that work for a rank writes the line, behind everything that they have written.
__device__ __forceinline__ void finish_line(const Scene& scene, u32 rank, u32 parts, u32 count, u32 status, u64 signature) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  Layer* layer = scene.layer;
  if (atomicAdd(&layer->counters[rank], 1u) != parts - 1) return;
  layer->counters[rank] = 0;  // for the next kernel, which begins when this one has ended
  __threadfence_system();
  Line* line = line_of(scene, layer->windows[rank], scene.me);
  line->mask = layer->mask, line->signature = signature, line->count = count, line->status = status;
  store_release(&line->number, scene.number);
}

// Of all CTAs the first to decide whether a rank came does so for all.
__device__ __forceinline__ bool decided(Layer* layer, u32 rank, bool came) {
  u64 before = atomicCAS(&layer->verdicts[rank], 0ull, came ? 1ull : 2ull);
  return before == 0 ? came : before == 1;
}

// Until so long after the operation began a line that is there needs no verdict, and until twice that nobody is lost: who
// gives a rank up looks for its line then, and sees what anybody has seen.
__device__ __forceinline__ u64 trust_of(u64 deadline) { return deadline / 2 < 20 * kMillisecond ? deadline / 2 : 20 * kMillisecond; }

__device__ __forceinline__ bool is_ours(const Scene& scene, u32 rank, u64 number, u64 deadline) {
  if (number > scene.number) {  // they have gone on without us
    atomicMax(&scene.layer->found, u64(rank + 1));
    return decided(scene.layer, rank, false);
  }
  return nanoseconds() - look_at(&scene.layer->began) < trust_of(deadline) || decided(scene.layer, rank, true);
}

// Whether the line of another rank, of this operation, says that this one takes no part.
__device__ __forceinline__ bool is_masked_by_others(const Scene& scene, u32 rank) {
  for (u32 other = 0; other < scene.layer->ranks; ++other) {
    if (other == scene.me || other == rank || has(scene.absent, other)) continue;
    const Line* line = line_of(scene, scene.window, other);
    if (load_acquire(&line->number) == scene.number && has(look_at(&line->mask), rank)) return true;
  }
  return false;
}

// Tell all others that we wait, and for how long we may: who waits for us shall wait longer.
__device__ __forceinline__ void tell_waiting(const Scene& scene, u64 remaining) {
  const Layer* layer = scene.layer;
  for (u32 other = 0; other < layer->ranks; ++other) {
    if (other == scene.me || has(scene.absent, other)) continue;
    auto* waiting = reinterpret_cast<Waiting*>(layer->windows[other] + layer->waits_at) + scene.me;
    *reinterpret_cast<volatile u64*>(&waiting->remaining) = remaining;
    store_release(&waiting->number, scene.number);
  }
}

// What a thread that has waited for a while looks at. Returns whether it goes on.
struct Patience {
  u64 since, until, deadline, heard;
  u32 looks;
};

__device__ __forceinline__ bool is_worth_waiting(const Scene& scene, u32 rank, u64 time, Patience& patience) {
  Layer* layer = scene.layer;
  if (look_at(&layer->found)) return false;
  if (look_at(&item<u64>(scene.window + layer->notices_at, rank)) > layer->base) {  // it has masked us
    atomicMax(&layer->found, u64(rank + 1));
    return false;
  }
  const Waiting* waiting = &item<Waiting>(scene.window + layer->waits_at, rank);
  if (load_acquire(&waiting->number) == scene.number - 1) {
    u64 remaining = look_at(&waiting->remaining);
    if (remaining != patience.heard) {
      patience.heard = remaining;
      u64 until = time + remaining + patience.deadline;
      if (until > patience.until) {
        patience.until = until;
        tell_waiting(scene, until - time);
      }
    }
  }
  u64 waited = time > patience.since ? time - patience.since : 0;
  if (waited > 20 * kMillisecond && look_at(&layer->told) != scene.number)
    if (atomicExch(&layer->told, scene.number) != scene.number) tell_waiting(scene, patience.until - time);
  if (time - look_at(&layer->began) < 2 * trust_of(patience.deadline)) return true;
  if (time > patience.until) return false;
  if (patience.looks++ % 64 != 0) return true;
  if (has(look_at(&reinterpret_cast<const Page*>(layer->page)->excused), rank)) return false;
  return waited < 100 * kMillisecond || !is_masked_by_others(scene, rank);
}

// Wait until a rank's line is there, or it is given up: alike in all CTAs.
__device__ __forceinline__ bool wait_for(const Scene& scene, u32 rank, u64 deadline) {
  Layer* layer = scene.layer;
  const u64* word = &line_of(scene, scene.window, rank)->number;
  for (u32 look = 0; look < 64; ++look) {
    u64 number = load_acquire(word);
    if (number >= scene.number) return is_ours(scene, rank, number, deadline);
  }
  u64 time = nanoseconds(), before = atomicCAS(&layer->since, 0ull, time);
  u64 since = before == 0 ? time : before;
  Patience patience = {since, since + deadline, deadline, 0, 0};
  for (u32 nap = 32;; nap = nap < 1000 ? 2 * nap : nap) {
    time = nanoseconds();  // before the look at the line
    u64 number = load_acquire(word);
    if (number >= scene.number) return is_ours(scene, rank, number, deadline);
    u64 verdict = look_at(&layer->verdicts[rank]);
    if (verdict != 0) return verdict == 1;
    if (!is_worth_waiting(scene, rank, time, patience)) return decided(layer, rank, false);
    __nanosleep(nap);
  }
}

// What the lines of an operation say, by source.
struct Seen {
  u64 came, masks[kRanks];
  u32 counts[kRanks];  // 0 of those that are refused
  u32 status[kRanks];
};

// How lines are looked at. `most`: rows that there can be; `sent`: i32 by rank, rows that must come back.
struct Look {
  u64 signature, deadline, sent;
  u32 most, waits;
};

__device__ __forceinline__ void read_line(const Scene& scene, const Look& look, u32 rank, Seen& seen) {
  const Line* line = line_of(scene, scene.window, rank);
  u32 count = line->count, status = line->status;
  if (status == kFine && look.signature != 0 && line->signature != 0 && line->signature != look.signature) status = kDiffers;
  if (status == kFine && (count > look.most || (look.sent != 0 && i32(count) != item<i32>(look.sent, rank)))) status = kDamaged;
  seen.masks[rank] = line->mask, seen.status[rank] = status, seen.counts[rank] = status == kFine ? count : 0;
  atomicOr(&seen.came, bit(rank));
}

// Look at the lines of some ranks, and wait for them if need be. All threads come here, and know what is seen.
__device__ __forceinline__ void look_for(const Scene& scene, const Look& look, u64 ranks, Seen& seen) {
  __syncthreads();
  if (threadIdx.x == 0) seen.came = 0;
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x) seen.masks[rank] = seen.counts[rank] = seen.status[rank] = 0;
  __syncthreads();
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x) {
    if (!has(ranks & ~scene.absent, rank)) continue;
    if (look.waits ? wait_for(scene, rank, look.deadline) : has(scene.layer->came, rank)) read_line(scene, look, rank, seen);
  }
  __syncthreads();
}

// 1 + the rank that has masked us, 0 if none has.
__device__ __forceinline__ u64 masked_by(const Scene& scene, const Seen& seen) {
  u64 by = look_at(&scene.layer->found);
  for (u32 rank = 0; rank < kRanks && by == 0; ++rank)
    if (has(seen.came, rank) && has(seen.masks[rank], scene.me)) by = rank + 1;
  return by;
}

// Whom the others have masked. Of two that have masked each other the lower one stays.
__device__ __forceinline__ u64 masked_by_others(const Scene& scene, const Seen& seen) {
  u64 heard = 0, known = scene.layer->mask;
  for (u32 rank = 0; rank < kRanks; ++rank) {
    u64 mask = has(seen.came, rank) ? seen.masks[rank] & ~known : 0;
    for (u32 other = 0; mask != 0 && other < rank; ++other)
      if (has(mask & seen.came, other) && has(seen.masks[other], rank)) mask &= ~bit(other);
    heard |= mask;
  }
  return heard & ~bit(scene.me);
}

// Mask ranks, and tell them, unless the host says that they are gone. Nothing touches their memory from then on.
__device__ __forceinline__ void lose(const Scene& scene, u64 ranks) {
  Layer* layer = scene.layer;
  auto* page = reinterpret_cast<volatile Page*>(layer->page);
  u64 told = ranks & ~page->excused;
  for (u32 rank = 0; rank < layer->ranks; ++rank)
    if (has(told, rank)) store_release(&item<u64>(layer->windows[rank] + layer->notices_at, scene.me), scene.number);
  layer->mask |= ranks, page->lost |= ranks;
}

__device__ __forceinline__ void tell_refusals(const Scene& scene, const Seen& seen) {
  auto* page = reinterpret_cast<volatile Page*>(scene.layer->page);
  for (u32 rank = 0; rank < scene.layer->ranks; ++rank)
    if (seen.status[rank] != kFine) page->status[rank] = seen.status[rank], page->refused |= bit(rank);
}

// Whether this CTA is the last of its launch to come here. All its threads do.
__device__ __forceinline__ bool is_last(const Scene& scene) {
  __shared__ bool is_it;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_it = atomicAdd(&scene.layer->ended, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_it;
}

// End the operation: the last CTA's, which has seen all lines.
__device__ __forceinline__ void end_operation(const Scene& scene, const Seen& seen) {
  Layer* layer = scene.layer;
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x) layer->verdicts[rank] = 0;
  bool is_refused = false;
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x) is_refused |= seen.status[rank] != kFine;
  is_refused = __syncthreads_or(is_refused);
  if (threadIdx.x != 0) return;
  auto* page = reinterpret_cast<volatile Page*>(layer->page);
  if (layer->masked == 0) {
    u64 by = masked_by(scene, seen);
    if (by != 0) {
      layer->masked = by, page->masked = by;
    } else {
      u64 ranks = (~seen.came | masked_by_others(scene, seen)) & ~scene.absent & ~bit(scene.me);
      if (ranks != 0) lose(scene, ranks);
    }
  }
  if (is_refused) tell_refusals(scene, seen);
  layer->since = layer->found = layer->came = 0, layer->ended = 0;
  u64 turns = ++layer->turns[scene.kind];
  layer->operation = scene.number;
  page->turns[scene.kind] = turns, page->operation = scene.number;
}

// How many pairs each local expert gets, from all.
__device__ __forceinline__ u32 load_of(const Scene& scene, const Seen& seen, u32 expert) {
  u32 sum = 0;
  for (u32 rank = 0; rank < kRanks; ++rank)
    if (seen.counts[rank] != 0) sum += item<u32>(loads_of(scene, scene.window, rank), expert);
  return sum;
}

// Sums

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
__device__ __noinline__ void add_up_packs(const Addition& work, u32 piece, u32 pieces, u32 lane) {
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
__device__ __noinline__ void add_up_elements(const Addition& work, u32 piece, u32 pieces, u32 lane) {
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
    bool is_here = id >= 0 && item<i32>(a.holders, id) == i32(rank);
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
  u32 tokens = a.status == kFine ? a.tokens : 0;
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
  u32 status = a.status != kFine ? a.status : is_wrong ? kRange : kFine;
  finish_line(scene, rank, parts, status == kFine ? count : 0, status, a.signature);
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

// Give

__device__ __forceinline__ void sum_pairs(const Give& a, u64 row, u64 to, Terms& terms, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp;
  u64 rows[2] = {0, 0};
  float weights[2] = {1.0f, 1.0f};
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    u32 k = lane + half * kWarp;
    if (k >= a.topk) continue;
    i32 place = item<i32>(a.pairs, row * a.topk + k);
    if (place < 0) continue;
    rows[half] = a.y + u64(place) * a.y_stride;
    if (a.weights != 0) weights[half] = item<float>(a.weights, row * a.topk + k);
  }
  Addition work = {};
  work.terms = &terms, work.count = gather_terms(terms, rows, weights, lane), work.is_weighted = a.weights != 0;
  work.hidden = a.hidden, work.out_dtype = a.dtype, work.out = to;
  bool is_aligned = (a.y | a.y_stride | u64(a.hidden) * itemsize_of(a.dtype)) % 16 == 0;
  switch (a.dtype) {
    case kF32: return add_up_plain<kF32>(work, is_aligned, piece, pieces, lane);
    case kBf16: return add_up_plain<kBf16>(work, is_aligned, piece, pieces, lane);
    case kF16: return add_up_plain<kF16>(work, is_aligned, piece, pieces, lane);
    default: return add_up_plain<kF64>(work, is_aligned, piece, pieces, lane);
  }
}

__device__ __forceinline__ void give_item(const Give& a, u64 row, u32 number, u64 items, Terms& terms, u32 piece, u32 pieces) {
  u32 lane = threadIdx.x % kWarp, nbytes = a.hidden * itemsize_of(a.dtype);
  if (a.mode == kGivePairs) {
    for (u32 k = 0; k < a.topk; ++k) {
      u64 pair = row * a.topk + k, to = items + (u64(number) * a.topk + k) * a.item_nbytes;
      i32 place = item<i32>(a.pairs, pair);
      if (place < 0) continue;
      copy_span(a.y + u64(place) * a.y_stride, to, nbytes, piece, pieces, lane);
      if (a.beside_at != kNowhere && piece == 0 && lane == 0) item<float>(to + a.beside_at, 0) = item<float>(a.beside, pair);
    }
    return;
  }
  u64 to = items + u64(number) * a.item_nbytes;
  if (a.mode == kSums) sum_pairs(a, row, to, terms, piece, pieces);
  else copy_span(a.y + row * a.y_stride, to, nbytes, piece, pieces, lane);
  for (u32 k = lane; a.beside_at != kNowhere && piece == 0 && k < a.topk; k += kWarp)
    item<float>(to + a.beside_at, k) = item<float>(a.beside, row * a.topk + k);
}

__device__ __forceinline__ void give_part(const Give& a, const Scene& scene, u32 rank, u32 part, u32 parts) {
  __shared__ Terms terms[kWarps];
  if (has(scene.absent, rank)) return;
  u32 begin = rank * scene.layer->capacity, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  u32 count = a.counts != 0 && a.status == kFine ? u32(item<i32>(a.counts, rank)) : 0;
  if (a.is_packed) {
    begin = 0;
    for (u32 other = 0; count != 0 && other < rank; ++other) begin += u32(item<i32>(a.counts, other));
  }
  u64 items = items_of(scene, scene.layer->windows[rank], scene.me);
  Share share = share_of(rows_of_part(count, part, parts));
  for (u32 i = warp; i < share.items; i += warps) {
    u32 number = part + i / share.pieces * parts;
    give_item(a, u64(begin) + number, number, items, terms[warp], i % share.pieces, share.pieces);
  }
  finish_line(scene, rank, parts, count, a.status, a.signature);
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

// What makes up for the terms of a token that are missing: all its weights over those that count. 0 if none is missing.
__device__ __forceinline__ float lost_scale(const Backs& backs, u64 token, Terms& terms) {
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
  if (__ballot_sync(kFull, is_missing) == 0) return 0.0f;
  return rest.sums[0] == 0.0f ? 1.0f : __fdiv_rn(whole.sums[0], rest.sums[0]);
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
  if (a.renormalises && a.mode != kApart) work.scale = lost_scale(backs, token, terms);
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
  work.is_scaled = work.scale != 0.0f;
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

__device__ __forceinline__ u64 usable_of(const Seen& seen) {
  u64 usable = seen.came;
  for (u32 rank = 0; rank < kRanks; ++rank)
    if (seen.status[rank] != kFine) usable &= ~bit(rank);
  return usable;
}

// Order

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

// A CTA for each part of each rank's rows: it looks through the tokens, and copies what is its own.
__global__ void __launch_bounds__(kThreads, 2) raynixl_moe_send(const __grid_constant__ Send a) {
  Scene scene = scene_of(a.layer, kDispatch);
  note_beginning(scene);
  u32 parts = gridDim.x / a.ranks > 0 ? gridDim.x / a.ranks : 1, units = parts * a.ranks;
  for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x)
    send_part(a, scene, (scene.me + 1 + unit) % a.ranks, unit / a.ranks, parts, unit, units);
}

// One CTA: waits for the lines of all ranks, and tells the host what they say.
__global__ void __launch_bounds__(kThreads) raynixl_moe_arrive(const __grid_constant__ Arrive a) {
  __shared__ Seen seen;
  Scene scene = scene_of(a.layer, a.kind);
  auto* page = reinterpret_cast<volatile Page*>(scene.layer->page);
  u32 most = a.kind == kDispatch ? scene.layer->capacity : kNowhere;
  look_for(scene, {a.signature, a.deadline, a.sent, most, 1}, ~0ull, seen);
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x)
    page->status[rank] = seen.status[rank], page->counts[rank] = seen.counts[rank];
  for (u32 e = threadIdx.x; e < a.loads_count; e += blockDim.x) page->experts[e] = load_of(scene, seen, e);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  scene.layer->came = seen.came;
  u64 by = scene.layer->masked ? scene.layer->masked : masked_by(scene, seen);
  if (by != 0) page->masked = by;
  __threadfence_system();
  page->ticket = a.ticket;
}

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
  end_operation(scene, seen);
}

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
  Backs backs = {a, scene, usable_of(seen)};
  u32 warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  u64 rows = a.mode == kApart ? u64(a.tokens) * a.topk : a.tokens, all = u64(gridDim.x) * warps;
  u32 most = (a.hidden * itemsize_of(a.dtype) / 16 + kWarp - 1) / kWarp;
  u32 pieces = rows == 0 || rows >= all ? 1 : u32(all / rows);
  if (pieces > most) pieces = most > 0 ? most : 1;
  for (u64 i = u64(blockIdx.x) * warps + warp; i < rows * pieces; i += all)
    sum_row(backs, i / pieces, terms[warp], u32(i % pieces), pieces);
  if (is_last(scene)) end_operation(scene, seen);
}

// From the next operation on these ranks take no part.
__global__ void raynixl_moe_mask(const __grid_constant__ Mask a) {
  if (threadIdx.x == 0) reinterpret_cast<Layer*>(a.layer)->mask |= a.mask;
}

}  // extern "C"
