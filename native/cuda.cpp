#include "cuda.h"

namespace raynixl {

std::atomic<const CudaContext*> cuda_context{nullptr};

void enter_cuda(const CudaContext& entered) {
  if (cuda_context.load() != nullptr) return;
  auto* kept = new CudaContext(entered);  // for as long as the process: threads may be looking at it
  const CudaContext* none = nullptr;
  if (!cuda_context.compare_exchange_strong(none, kept, std::memory_order_acq_rel)) delete kept;
}

void take_cuda_context(const CudaContext& entered) {
  thread_local bool taken = false;
  if (taken) return;
  taken = true;  // also if it fails: CUDA then says so to UCX
  void* current = nullptr;
  if (entered.get_current(&current) == 0 && current == nullptr) entered.set_current(entered.context);
}

int copy_one_by_one(CudaCopy copy, const uint64_t* rows, size_t count, void* stream) {
  for (const uint64_t* row = rows; row != rows + 3 * count; row += 3) {
    if (int code = copy(row[1], row[0], row[2], stream)) return code;
  }
  return 0;
}

}  // namespace raynixl
