// The kernels of nvlink_kernels.cu as ordinary code of the host: CTAs one after the other, their threads as fibers that
// take turns at barriers. Compiled by tests/backends/test_nvlink_kernels.py, with KERNELS as the path of the source.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

struct Fiber {
  ucontext_t context;
  bool is_done = false;
  std::vector<char> stack = std::vector<char>(256 << 10);
};
struct Barrier {
  unsigned size, waiting = 0, turn = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Barrier> barriers;  // the CTA's, then each warp's
ucontext_t scheduler;
std::function<void()> body;
uint64_t exchanged[1024];

void let_others_run() { swapcontext(&fibers[threadIdx.x]->context, &scheduler); }

void meet(Barrier& barrier) {
  unsigned turn = barrier.turn;
  if (++barrier.waiting == barrier.size) {
    barrier.waiting = 0;
    ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) let_others_run();
}

void run_fiber() {
  body();
  fibers[threadIdx.x]->is_done = true;
  let_others_run();
}

void run_cta(unsigned threads) {
  barriers.assign(1 + threads / 32, Barrier{32});
  barriers[0].size = threads;
  fibers.clear();
  for (unsigned k = 0; k < threads; ++k) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (unsigned k = 0; k < threads; ++k) {
      if (fibers[k]->is_done) continue;
      goes_on = true;
      threadIdx.x = k;
      swapcontext(&scheduler, &fibers[k]->context);
    }
  }
}

template <class To, class From>
To bits_of(From value) {
  To made;
  std::memcpy(&made, &value, sizeof made);
  return made;
}

float widened(uint16_t half) { return float(bits_of<_Float16>(half)); }

template <class Value, class Pick>
Value exchange(Value value, Pick pick) {
  Barrier& warp = barriers[1 + threadIdx.x / 32];
  uint64_t* slots = exchanged + threadIdx.x / 32 * 32;
  slots[threadIdx.x % 32] = uint64_t(value);
  meet(warp);
  Value found = pick(slots);
  meet(warp);
  return found;
}

}  // namespace

static void __syncthreads() { meet(barriers[0]); }
static void __threadfence() {}
static void __threadfence_system() {}
template <class Value>
static Value __shfl_sync(unsigned, Value value, unsigned from) {
  return exchange(value, [&](const uint64_t* slots) { return Value(slots[from]); });
}
template <class Value>
static Value __shfl_xor_sync(unsigned, Value value, unsigned mask) {
  unsigned from = threadIdx.x % 32 ^ mask;
  return exchange(value, [&](const uint64_t* slots) { return Value(slots[from]); });
}
static unsigned __reduce_max_sync(unsigned, unsigned value) {
  return exchange(value, [&](const uint64_t* slots) {
    uint64_t most = 0;
    for (int k = 0; k < 32; ++k) most = slots[k] > most ? slots[k] : most;
    return unsigned(most);
  });
}
template <class Value>
static Value atomicAdd(Value* to, Value value) {
  Value before = *to;
  *to += value;
  return before;
}
template <class Value>
static Value atomicExch(Value* to, Value value) {
  Value before = *to;
  *to = value;
  return before;
}
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
static float __uint_as_float(unsigned value) { return bits_of<float>(value); }
static unsigned __float_as_uint(float value) { return bits_of<unsigned>(value); }
static unsigned __float2uint_rn(float value) { return unsigned(std::nearbyint(value)); }
static float __fdiv_rn(float a, float b) { return a / b; }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
#define asm(...) wide = widened(value.bits)  // the only one there is: cvt.f32.f16

#include KERNELS
#undef asm

template <class... Types, size_t... k>
static void call(void (*kernel)(Types...), const u64* values, std::index_sequence<k...>) {
  kernel((Types)(values[k])...);
}

// Returns whether a kernel of that name is known here.
extern "C" int run_kernel(const char* name, unsigned grid, unsigned threads, const u64* values) {
  auto run = [&](auto kernel, auto numbers) {
    blockDim.x = threads, gridDim.x = grid;
    body = [=] { call(kernel, values, numbers); };
    for (unsigned k = 0; k < grid; ++k) blockIdx.x = k, run_cta(threads);
    return 1;
  };
  auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("raynixl_copy_small")) return run(raynixl_copy_small, std::make_index_sequence<6>());
  if (is("raynixl_copy_range")) return run(raynixl_copy_range, std::make_index_sequence<7>());
  if (is("raynixl_copy_tiles")) return run(raynixl_copy_tiles, std::make_index_sequence<5>());
  if (is("raynixl_copy_narrow")) return run(raynixl_copy_narrow, std::make_index_sequence<5>());
  if (is("raynixl_signal")) return run(raynixl_signal, std::make_index_sequence<3>());
  if (is("raynixl_digest")) return run(raynixl_digest, std::make_index_sequence<12>());
  if (is("raynixl_quantise_float32")) return run(raynixl_quantise_float32, std::make_index_sequence<5>());
  if (is("raynixl_quantise_bfloat16")) return run(raynixl_quantise_bfloat16, std::make_index_sequence<5>());
  if (is("raynixl_quantise_float16")) return run(raynixl_quantise_float16, std::make_index_sequence<5>());
  return 0;
}
