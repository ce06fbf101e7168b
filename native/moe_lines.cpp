#include "moe.h"

#include <cerrno>
#include <climits>
#include <cstring>

#include <algorithm>
#include <atomic>

#include <sched.h>

#include "clock.h"

namespace raynixl {

namespace {

struct Bell {
  std::atomic<uint32_t> rings;
  std::atomic<uint32_t> due;  // the count at which to wake, marked; 0: nobody sleeps
};
static_assert(sizeof(Bell) == 8 && std::atomic<uint32_t>::is_always_lock_free);

Bell& bell_at(uint64_t address) { return *reinterpret_cast<Bell*>(address); }

std::atomic<uint64_t>& word_at(uint64_t address) { return *reinterpret_cast<std::atomic<uint64_t>*>(address); }

// A count as it stands in `due`: its lower 31 bits, marked so that it is never 0.
uint32_t marked(uint32_t count) { return count << 1 | 1; }

// Whether a marked count comes after another; they wrap.
bool is_after(uint32_t due, uint32_t other) { return int32_t(due - other) > 0; }

// Shared by processes, so not FUTEX_PRIVATE_FLAG.
long futex(std::atomic<uint32_t>& word, int op, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, &word, op, value, limit, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void wake(Bell& bell) { futex(bell.rings, FUTEX_WAKE, INT_MAX, nullptr); }

size_t missing(const Lines& lines) { return lines.count - lines.arrived(); }

// Each word that is missing rings once when it comes: before so many rings nobody need wake.
size_t rings_needed(const Lines& lines) {
  std::vector<uint64_t> words;
  for (size_t i = 0; i < lines.count; ++i)
    if (word_at(lines.addresses[i]).load(std::memory_order_acquire) < lines.numbers[i])
      words.push_back(lines.addresses[i]);
  std::sort(words.begin(), words.end());
  return size_t(std::unique(words.begin(), words.end()) - words.begin());
}

// Have whoever rings at `count + more` wake us, or sooner if somebody else is to be woken sooner.
void ask_to_be_woken(Bell& bell, uint32_t count, size_t more) {
  uint32_t wanted = marked(count + uint32_t(std::min<size_t>(more, 1 << 20)));
  uint32_t due = bell.due.load();
  while (due == 0 || !is_after(due, marked(count)) || is_after(due, wanted))
    if (bell.due.compare_exchange_weak(due, wanted)) return;
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

// False if a signal ended the sleep.
bool sleep_until(Bell& bell, uint32_t count, int64_t deadline_ns) {
  timespec until{time_t(deadline_ns / 1'000'000'000), long(deadline_ns % 1'000'000'000)};
  long rc = futex(bell.rings, FUTEX_WAIT_BITSET, count, deadline_ns == INT64_MAX ? nullptr : &until);
  return !(rc < 0 && errno == EINTR);
}

// Count a ring, and wake those who are due.
void ring_once(Bell& bell) {
  uint32_t count = bell.rings.fetch_add(1) + 1;
  uint32_t due = bell.due.load();
  if (due == 0 || is_after(due, marked(count))) return;
  bell.due.compare_exchange_strong(due, 0);  // if it changed meanwhile, others sleep: those who were due sleep, too
  wake(bell);
}

}  // namespace

size_t Lines::arrived() const {
  size_t n = 0;
  for (size_t i = 0; i < count; ++i)
    n += word_at(addresses[i]).load(std::memory_order_acquire) >=
         std::atomic_ref(const_cast<uint64_t&>(numbers[i])).load(std::memory_order_relaxed);
  return n;
}

void ring(uint64_t address) {
  Bell& bell = bell_at(address);
  bell.rings.fetch_add(1);
  if (bell.due.exchange(0) != 0) wake(bell);
}

int post_line(const Line& line, const Gates& gates) {
  if (int code = gates.enter()) return code;
  std::memcpy(reinterpret_cast<void*>(line.address + 8), line.payload, line.nbytes);
  word_at(line.address).store(line.number, std::memory_order_release);
  if (line.bell != 0) ring_once(bell_at(line.bell));
  gates.leave();
  return 0;
}

Waited wait_lines(const Lines& lines, uint64_t address, int64_t deadline_ns, int64_t spin_until_ns) {
  Bell& bell = bell_at(address);
  for (;;) {
    if (missing(lines) == 0) return Waited::all;
    int64_t now = now_ns();
    if (now >= deadline_ns) return Waited::timeout;
    if (now < spin_until_ns) {
      // At each look: with more processes than cores the line that is missing comes from one that does not run.
      // Exchanges of 2, 4, 8 processes on 2 cores took 0.5, 2.7, 9 us; yielding at each 64th look 0.2, 10, 50;
      // sleeping at once 18, 21, 38.
      sched_yield();
      continue;
    }
    uint32_t count = bell.rings.load();
    size_t more = rings_needed(lines);
    if (more == 0) return Waited::all;
    ask_to_be_woken(bell, count, more);
    if (!sleep_until(bell, count, deadline_ns)) return Waited::interrupted;
  }
}

}  // namespace raynixl
