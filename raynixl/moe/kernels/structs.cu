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
constexpr u32 kFine = 0, kRange = 1, kConfig = 2, kDiffers = 3, kDamaged = 4, kStatuses = 8;  // of Refusal
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
  u64 waits[kRanks];     // nanoseconds
  u32 counters[kRanks], ended, spare;
};
struct Page {
  u64 ticket, operation, turns[2], lost, masked, excused, refused;
  u32 status[kRanks], counts[kRanks], experts[kLocalExperts];
  u64 refusals[kRanks];  // operation * kStatuses + status
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
  u64 ids, row_ids, weights, row_weights, tokens, counts, experts, expected, positions, place_weights, waited, signature;
  u64 deadline;
  u32 columns_count, row_nbytes, ids_at, weights_at, token_at, ids_nbytes, topk, ranks, loads_count, is_packed, waits;
  u32 waited_count;
};
struct Give {
  u64 layer, y, y_stride, beside, pairs, weights, row_ids, counts, signature;
  u32 hidden, dtype, item_nbytes, beside_at, topk, ranks, mode, is_packed, status, y_rows;
};
struct Sum {
  u64 layer, row_of, holder_of, sent, weights, out, out_stride, biases[2], bias_strides[2], out_weights, waited, signature;
  u64 deadline;
  u32 tokens, topk, ranks, hidden, dtype, out_dtype, bias_dtype, bias_count, item_nbytes, beside_at, mode, renormalises, waits,
      waited_count;
};
struct Mask {
  u64 layer, mask, told;
};
static_assert(sizeof(Column) == 24 && sizeof(Line) == kLineNbytes && sizeof(Layer) == 1984 && sizeof(Page) == 9280, "");
static_assert(sizeof(Send) == 312 && sizeof(Arrive) == 56 && sizeof(Order) == 272 && sizeof(Take) == 352, "");
static_assert(sizeof(Give) == 112 && sizeof(Sum) == 176 && sizeof(Mask) == 24, "");

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
  u32 kind, side, me, ranks;
};

__device__ __forceinline__ Scene scene_of(u64 address, u32 kind) {
  auto* layer = reinterpret_cast<Layer*>(address);
  u32 ranks = layer->ranks, me = layer->me;
  u64 absent = layer->masked ? ~0ull : layer->mask;
  if (ranks < kRanks) absent |= ~0ull << ranks;
  return {layer, layer->operation + 1, absent, layer->windows[me], kind, u32(layer->turns[kind] & 1), me, ranks};
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

}  // namespace
