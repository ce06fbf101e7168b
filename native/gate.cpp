#include "gate.h"

namespace raynixl {

void Gate::close(int code) {
  uint64_t state = state_.load(std::memory_order_relaxed);
  while (!(state & kCodeMask)) {
    if (state_.compare_exchange_weak(state, state | uint64_t(code) << 32, std::memory_order_acq_rel)) return;
  }
}

Gate::Drained Gate::drain(int64_t deadline_ns) {
  state_.fetch_or(kDrainer, std::memory_order_acq_rel);
  for (;;) {
    uint32_t seen = emptied_.value();
    if (inflight() == 0) return Drained::yes;
    if (now_ns() >= deadline_ns) return Drained::timeout;
    if (!emptied_.wait(seen, deadline_ns)) return Drained::interrupted;
  }
}

}  // namespace raynixl
