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

int Gates::enter() const {
  for (size_t i = 0; i < gates_.size(); ++i) {
    int code = gates_[i]->enter();
    if (code == 0) continue;
    while (i > 0) gates_[--i]->leave();
    return code;
  }
  return 0;
}

void Gates::leave() const {
  for (const auto& gate : gates_) gate->leave();
}

int Gates::aborted() const {
  for (const auto& gate : gates_)
    if (int code = gate->aborted()) return code;
  return 0;
}

}  // namespace raynixl
