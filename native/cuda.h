// The CUDA context that threads work in while they drive UCX: it asks CUDA about events, which may crash without one.
#pragma once

#include <atomic>

namespace raynixl {

// Functions of the driver: cuCtxGetCurrent and cuCtxSetCurrent. Nothing here links to CUDA.
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

}  // namespace raynixl
