#include "gate.h"

namespace raynixl {

void Gate::close(int code, bool abort) {
  uint64_t state = state_.load(std::memory_order_relaxed);
  uint64_t closed;
  do {
    closed = state | (state & kCodeMask ? 0 : uint64_t(code) << 32) | (abort ? kAbort : 0);
  } while (!state_.compare_exchange_weak(state, closed, std::memory_order_acq_rel));
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
