// What kernels for GPUs are written in, as ordinary code of the host: CTAs one after the other, or some at a time, their
// threads as fibers that take turns at barriers. All of it is a thread's own, so that several threads may run kernels at a
// time, which wait for each other as those of several GPUs do. Included before the kernels' source.
#include <sched.h>
#include <time.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels_watched.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

// Where a thread of execution stands, apart from others of the same thread of the system. By hand where we can:
// swapcontext calls the system twice.
#if defined(__x86_64__)
using Context = void*;  // the stack, with what must be kept on top
extern "C" void raynixl_switch(Context* from, Context to);
asm(R"(
.text
.type raynixl_switch, @function
raynixl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size raynixl_switch, .-raynixl_switch
)");
inline void switch_to(Context& from, Context& to) { raynixl_switch(&from, to); }
inline void make_context(Context& made, char* stack, size_t nbytes, void (*run)()) {
  auto* top = reinterpret_cast<void**>(uintptr_t(stack + nbytes) & ~uintptr_t(15));
  *--top = nullptr;  // no caller, and the alignment that a function finds
  *--top = reinterpret_cast<void*>(run);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  made = top;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& made, char* stack, size_t nbytes, void (*run)()) {
  getcontext(&made);
  made.uc_stack = {stack, 0, nbytes};
  made.uc_link = nullptr;
  makecontext(&made, run, 0);
}
#endif

constexpr size_t kStackNbytes = 128 << 10;

struct Fiber {
  Context context;
  bool is_done = false;
  std::unique_ptr<char[]> stack{new char[kStackNbytes]};
  Watched watched;
};
struct Barrier {
  unsigned size, waiting = 0, turn = 0;
};

thread_local std::vector<std::unique_ptr<Fiber>> fibers;
thread_local std::vector<Barrier> barriers;  // the CTA's, then each warp's
thread_local Context scheduler;
thread_local std::function<void()> body;
thread_local uint64_t exchanged[1024];
thread_local int gathered;

inline void let_others_run() {
  Fiber& mine = *fibers[threadIdx.x];
  note_going_back(mine.is_done);
  switch_to(mine.context, scheduler);
  note_coming();
}

inline void meet(Barrier& barrier) {
  unsigned turn = barrier.turn;
  if (++barrier.waiting == barrier.size) {
    barrier.waiting = 0;
    ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) let_others_run();
}

inline void run_fiber() {
  note_coming();
  body();
  fibers[threadIdx.x]->is_done = true;
  let_others_run();
}

inline void run_cta(unsigned threads) {
  barriers.assign(1 + threads / 32, Barrier{32});
  barriers[0].size = threads;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned k = 0; k < threads; ++k) {
    Fiber& fiber = *fibers[k];
    fiber.is_done = false;
    fiber.watched.begin(fiber.stack.get(), kStackNbytes);
    make_context(fiber.context, fiber.stack.get(), kStackNbytes, run_fiber);
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (unsigned k = 0; k < threads; ++k) {
      if (fibers[k]->is_done) continue;
      goes_on = true;
      threadIdx.x = k;
      note_going_to(fibers[k]->watched);
      switch_to(scheduler, fibers[k]->context);
      note_back();
    }
  }
}

// Run a kernel, so many CTAs at a time: `kernel` calls it with its arguments.
template <class Kernel>
int run(Kernel kernel, unsigned grid, unsigned threads, unsigned at_once = 1) {
  std::atomic<unsigned> next{0};
  auto work = [&] {
    blockDim.x = threads, gridDim.x = grid;
    body = kernel;
    while ((blockIdx.x = next++) < grid) run_cta(threads);
    body = nullptr;
  };
  std::vector<std::thread> others;
  for (unsigned k = 1; k < at_once && k < grid; ++k) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  return 1;
}

template <class To, class From>
To bits_of(From value) {
  To made;
  std::memcpy(&made, &value, sizeof made);
  return made;
}

inline float widened(uint16_t half) { return float(bits_of<_Float16>(half)); }

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

}  // namespace host

inline void __syncthreads() {
  host::end_fence();
  host::meet(host::barriers[0]);
}
inline int __syncthreads_or(int value) {
  if (threadIdx.x == 0) host::gathered = 0;
  __syncthreads();
  host::gathered |= value != 0;
  __syncthreads();
  int found = host::gathered;
  __syncthreads();
  return found;
}
inline void __syncwarp() { host::meet(host::barriers[1 + threadIdx.x / 32]); }
inline void __threadfence() { host::fence(); }
inline void __threadfence_system() { host::fence(); }
inline void __nanosleep(unsigned) { sched_yield(); }
template <class Value>
Value __shfl_sync(unsigned, Value value, unsigned from) {
  return host::exchange(value, [&](const uint64_t* slots) { return Value(slots[from]); });
}
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, unsigned mask) {
  unsigned from = threadIdx.x % 32 ^ mask;
  return host::exchange(value, [&](const uint64_t* slots) { return Value(slots[from]); });
}
template <class Value>
Value __shfl_up_sync(unsigned, Value value, unsigned by) {
  unsigned lane = threadIdx.x % 32, from = lane < by ? lane : lane - by;
  return host::exchange(value, [&](const uint64_t* slots) { return Value(slots[from]); });
}
inline unsigned __ballot_sync(unsigned, int value) {
  return host::exchange(unsigned(value != 0), [&](const uint64_t* slots) {
    unsigned all = 0;
    for (int k = 0; k < 32; ++k) all |= unsigned(slots[k]) << k;
    return all;
  });
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
template <class Value>
Value atomicAdd(Value* to, Value value) {
  if (host::is_release(to)) return __atomic_fetch_add(to, value, __ATOMIC_RELEASE);
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class Value>
Value atomicOr(Value* to, Value value) {
  if (host::is_release(to)) return __atomic_fetch_or(to, value, __ATOMIC_RELEASE);
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
template <class Value>
Value atomicExch(Value* to, Value value) {
  if (host::is_release(to)) return __atomic_exchange_n(to, value, __ATOMIC_RELEASE);
  return __atomic_exchange_n(to, value, __ATOMIC_RELAXED);
}
template <class Value>
Value atomicCAS(Value* to, Value expected, Value value) {
  if (host::is_release(to)) __atomic_compare_exchange_n(to, &expected, value, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
  else __atomic_compare_exchange_n(to, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class Value>
Value atomicMax(Value* to, Value value) {
  Value before = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value > before && !__atomic_compare_exchange_n(to, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline float __uint_as_float(unsigned value) { return host::bits_of<float>(value); }
inline unsigned __float_as_uint(float value) { return host::bits_of<unsigned>(value); }
inline double __longlong_as_double(long long value) { return host::bits_of<double>(value); }
inline long long __double_as_longlong(double value) { return host::bits_of<long long>(value); }
inline unsigned __float2uint_rn(float value) { return unsigned(std::nearbyint(value)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
