// Monotonic time and a futex word: all waiting in the core goes through these two.
#pragma once

#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>

#include <atomic>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace raynixl {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

// Seconds from now as a deadline; negative and NaN count as now, anything huge as "never".
inline int64_t deadline_after(double seconds) {
  if (!(seconds > 0)) return now_ns();
  if (seconds > 1e9) return INT64_MAX;
  return now_ns() + int64_t(seconds * 1e9);
}

// What a loop that looks does in between: it leaves the core's other thread more to do.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A 32-bit word that threads sleep on until it changes. No lock inside, so a fork cannot leave it held.
class Futex {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire); }

  // Sleep while the word equals `expected`, until the deadline. False if a signal interrupted the sleep.
  bool wait(uint32_t expected, int64_t deadline_ns) {
    timespec until{time_t(deadline_ns / 1'000'000'000), long(deadline_ns % 1'000'000'000)};
    timespec* limit = deadline_ns == INT64_MAX ? nullptr : &until;
    long rc = syscall(SYS_futex, &word_, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, expected, limit, nullptr,
                      FUTEX_BITSET_MATCH_ANY);
    return !(rc < 0 && errno == EINTR);
  }

  // Change the word and wake up to `count` sleepers.
  void wake(int count = INT_MAX) {
    word_.fetch_add(1, std::memory_order_acq_rel);
    syscall(SYS_futex, &word_, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, count, nullptr, nullptr, 0);
  }

 private:
  std::atomic<uint32_t> word_{0};
};

}  // namespace raynixl
