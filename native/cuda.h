// The CUDA driver by addresses of its functions: nothing here links to CUDA.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace raynixl {

// The context that threads work in while they drive UCX, which asks CUDA about events and may crash without one. The
// functions are cuCtxGetCurrent and cuCtxSetCurrent.
struct CudaContext {
  void* context;
  int (*get_current)(void**);
  int (*set_current)(void*);
};

extern std::atomic<const CudaContext*> cuda_context;

// Have every thread that drives UCX from now on do so in this context, unless it has one. The first call counts.
void enter_cuda(const CudaContext& entered);

void take_cuda_context(const CudaContext& entered);

// Nothing but a load for a process without memory on a GPU.
inline void take_cuda_context() {
  if (auto* entered = cuda_context.load(std::memory_order_acquire)) take_cuda_context(*entered);
}

// cuMemcpyAsync: to, from, bytes, stream.
using CudaCopy = int (*)(uint64_t, uint64_t, size_t, void*);

// Copy rows of (from, to, nbytes) one call after another, in order on a stream; the driver's first error, or 0. It is
// what a loop in C reaches, for the benchmark to compare with.
int copy_one_by_one(CudaCopy copy, const uint64_t* rows, size_t count, void* stream);

}  // namespace raynixl
