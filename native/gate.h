// Gate: the door through which every operation enters a region's memory.
#pragma once

#include <cstdint>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "clock.h"

namespace raynixl {

class Gate {
 public:
  // Count the caller in; returns 0, or the code the gate was closed with (then the caller is not in).
  int enter() {
    uint64_t before = state_.fetch_add(1, std::memory_order_acq_rel);
    if (before & kCodeMask) {
      leave();
      return code_of(before);
    }
    return 0;
  }

  void leave() {
    uint64_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kDrainer) && (before & kCountMask) == 1) emptied_.wake();
  }

  // Refuse every later entry with `code` (2 or more, or the engine would read it as done). The first code stays.
  // Those inside stop soon if `abort`, else they finish; a later close may still abort them.
  void close(int code, bool abort);

  // The code if those inside are to stop, else 0.
  int aborted() const {
    uint64_t state = state_.load(std::memory_order_acquire);
    return state & kAbort ? code_of(state) : 0;
  }

  int code() const { return code_of(state_.load(std::memory_order_acquire)); }
  uint32_t inflight() const { return uint32_t(state_.load(std::memory_order_acquire) & kCountMask); }

  enum class Drained { yes, timeout, interrupted };
  // Wait until nobody is inside.
  Drained drain(int64_t deadline_ns);

 private:
  // One word, so that closing and entering are ordered: count (bits 0-31), code (32-61), abort (62),
  // drainer present (63).
  static constexpr uint64_t kCountMask = 0xffff'ffffULL;
  static constexpr uint64_t kCodeMask = 0x3fff'ffffULL << 32;
  static constexpr uint64_t kAbort = 1ULL << 62;
  static constexpr uint64_t kDrainer = 1ULL << 63;
  static int code_of(uint64_t state) { return int((state & kCodeMask) >> 32); }

  std::atomic<uint64_t> state_{0};
  Futex emptied_;
};

// The gates that one operation passes.
class Gates {
 public:
  explicit Gates(std::vector<std::shared_ptr<Gate>> gates) : gates_(std::move(gates)) {}

  // Enter every gate, or none: returns 0, or the code of the one that refused.
  int enter() const;
  void leave() const;
  // The code of the first gate whose closing stops those inside, 0 if there is none.
  int aborted() const;

 private:
  std::vector<std::shared_ptr<Gate>> gates_;
};

}  // namespace raynixl
