// Lines: written behind rows, waited for, and learnt from. An operation ends here.
namespace {

constexpr u32 kWrong = 1u << 16;  // more than there are CTAs

// The last CTA of all that work for a rank writes the line, behind everything that they have written. `is_wrong`: this CTA,
// all of it, has found that the call cannot be used.
__device__ __forceinline__ void finish_line(const Scene& scene, u32 rank, u32 parts, u32 count, u32 status, u64 signature,
                                            bool is_wrong) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  Layer* layer = scene.layer;
  u32 mine = is_wrong ? kWrong : 0, before = atomicAdd(&layer->counters[rank], mine + 1);
  if (before % kWrong != parts - 1) return;
  if (status == kFine && (before + mine) >= kWrong) status = kConfig, count = 0;
  __threadfence_system();
  layer->counters[rank] = 0;  // for the next kernel, which begins when this one has ended
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
  for (u32 other = 0; other < scene.ranks; ++other) {
    if (other == scene.me || other == rank || has(scene.absent, other)) continue;
    const Line* line = line_of(scene, scene.window, other);
    if (load_acquire(&line->number) == scene.number && has(look_at(&line->mask), rank)) return true;
  }
  return false;
}

// Tell all others that we wait, and for how long we may: who waits for us shall wait longer.
__device__ __forceinline__ void tell_waiting(const Scene& scene, u64 remaining) {
  const Layer* layer = scene.layer;
  for (u32 other = 0; other < scene.ranks; ++other) {
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

// Note how long a rank was waited for: of all CTAs, by that which waited for the longest.
__device__ __forceinline__ void note_wait(const Scene& scene, u32 rank, u64 since, u64 time) {
  if (time > since) atomicMax(&scene.layer->waits[rank], time - since);
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
    if (number >= scene.number) {
      note_wait(scene, rank, since, time);
      return is_ours(scene, rank, number, deadline);
    }
    u64 verdict = look_at(&layer->verdicts[rank]);
    if (verdict == 2) return false;
    if (verdict == 1) continue;  // another CTA has seen the line: so shall we, and what lies behind it
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
  for (u32 rank = 0; rank < scene.ranks && by == 0; ++rank)
    if (has(seen.came, rank) && has(seen.masks[rank], scene.me)) by = rank + 1;
  return by;
}

// Whom the others have masked. Of two that have masked each other the lower one stays.
__device__ __forceinline__ u64 masked_by_others(const Scene& scene, const Seen& seen) {
  u64 heard = 0, known = scene.layer->mask;
  for (u32 rank = 0; rank < scene.ranks; ++rank) {
    u64 mask = has(seen.came, rank) ? seen.masks[rank] & ~known : 0;
    for (u32 other = 0; mask != 0 && other < rank; ++other)
      if (has(mask & seen.came, other) && has(seen.masks[other], rank)) mask &= ~bit(other);
    heard |= mask;
  }
  return heard & ~bit(scene.me);
}

__device__ __forceinline__ void tell_masked(const Scene& scene, u64 ranks) {
  const Layer* layer = scene.layer;
  for (u32 rank = 0; rank < scene.ranks; ++rank)
    if (has(ranks, rank)) store_release(&item<u64>(layer->windows[rank] + layer->notices_at, scene.me), scene.number);
}

// Mask ranks, and tell them, unless the host says that they are gone. Nothing touches their memory from then on.
__device__ __forceinline__ void lose(const Scene& scene, u64 ranks) {
  Layer* layer = scene.layer;
  auto* page = reinterpret_cast<volatile Page*>(layer->page);
  tell_masked(scene, ranks & ~page->excused);
  layer->mask |= ranks, page->lost |= ranks;
}

__device__ __forceinline__ void tell_refusals(const Scene& scene, const Seen& seen) {
  auto* page = reinterpret_cast<volatile Page*>(scene.layer->page);
  for (u32 rank = 0; rank < scene.ranks; ++rank)
    if (seen.status[rank] != kFine) page->refusals[rank] = scene.number * kStatuses + seen.status[rank];
  __threadfence_system();
  page->refused = 2 * scene.number + 1;
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

// Add the seconds that ranks were waited for in this operation, if they came, and forget them.
__device__ __forceinline__ void add_waits(const Scene& scene, const Seen& seen, u64 waited, u32 count) {
  Layer* layer = scene.layer;
  for (u32 rank = threadIdx.x; rank < kRanks; rank += blockDim.x) {
    if (waited != 0 && rank < count && has(seen.came, rank)) item<double>(waited, rank) += double(look_at(&layer->waits[rank])) * 1e-9;
    layer->waits[rank] = 0;
  }
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
  for (u32 rank = 0; rank < scene.ranks; ++rank)
    if (seen.counts[rank] != 0) sum += item<u32>(loads_of(scene, scene.window, rank), expert);
  return sum;
}

}  // namespace

extern "C" {

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

// From the next operation on these ranks take no part. Those of them that are to be told, and took part, are.
__global__ void raynixl_moe_mask(const __grid_constant__ Mask a) {
  Scene scene = scene_of(a.layer, kDispatch);
  if (threadIdx.x != 0) return;
  tell_masked(scene, a.told & a.mask & ~scene.absent & ~bit(scene.me));
  scene.layer->mask |= a.mask;
}

}  // extern "C"
