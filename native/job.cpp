#include "job.h"

#include <algorithm>
#include <cerrno>
#include <system_error>

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "engine.h"

namespace raynixl {

namespace {

constexpr int64_t kLookUp = 100'000'000;  // how long a waiter copies before it sees to its signals, in ns

std::atomic<uint32_t> forks{0};

}  // namespace

uint32_t fork_generation() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

Job::Job(std::shared_ptr<Engine> engine, std::shared_ptr<const Plan> plan, int64_t deadline_ns, int participants,
         std::optional<Plan::Digest> digest)
    : engine_(std::move(engine)),
      plan_(std::move(plan)),
      deadline_ns_(deadline_ns),
      participants_limit_(uint32_t(participants)),
      generation_(fork_generation()),
      digest_(digest) {}

Job::~Job() {
  for (int fd : armed_) close(fd);
}

int Job::code() {
  int code = code_.load(std::memory_order_acquire);
  if (code != PENDING) return code;
  if (forked()) {
    code_.store(CLOSED, std::memory_order_release);  // our threads stayed in the parent
  } else if (now_ns() >= deadline_ns_) {
    end(TIMEOUT);
  }
  return code_.load(std::memory_order_acquire);
}

Job::Waited Job::wait(int64_t deadline_ns) {
  for (;;) {
    uint32_t seen = changed_.value();
    if (code() != PENDING) return Waited::ended;
    int64_t now = now_ns();
    if (now >= deadline_ns) return Waited::timeout;
    if (participate(std::min(deadline_ns, now + kLookUp))) {
      if (now_ns() >= now + kLookUp) return Waited::look_up;
      continue;
    }
    // Past its deadline and still pending: somebody is ending it this very moment.
    int64_t limit = now < deadline_ns_ ? std::min(deadline_ns, deadline_ns_) : deadline_ns;
    if (!changed_.wait(seen, limit)) return Waited::look_up;
  }
}

Job::Waited Job::wait_settled(int64_t deadline_ns) {
  for (;;) {
    uint32_t seen = changed_.value();
    if (settled()) return Waited::ended;
    int64_t now = now_ns();
    if (now >= deadline_ns) return Waited::timeout;
    int64_t limit = now < deadline_ns_ ? std::min(deadline_ns, deadline_ns_) : deadline_ns;
    if (!changed_.wait(seen, limit)) return Waited::look_up;
  }
}

bool Job::end(int code) {
  if (forked()) return false;
  uint32_t state = state_.load(std::memory_order_relaxed);
  do {
    if (!(state & kOpen)) return false;
  } while (!state_.compare_exchange_weak(state, state & ~kOpen, std::memory_order_acq_rel));
  if (state == kOpen) settle();
  announce(code);
  return true;
}

bool Job::arm(int fd) {
  if (code() != PENDING) return false;
  int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) throw std::system_error(errno, std::generic_category(), "dup");
  std::lock_guard guard(armed_lock_);
  if (code_.load(std::memory_order_acquire) == PENDING) {
    armed_.push_back(copy);
    return true;
  }
  close(copy);
  return false;
}

bool Job::has_place() const {
  uint32_t state = state_.load(std::memory_order_acquire);
  return (state & kOpen) && (state & ~kOpen) < participants_limit_ && !exhausted();
}

bool Job::participate(int64_t deadline_ns) {
  if (forked()) return false;
  uint32_t state = state_.load(std::memory_order_relaxed);
  do {
    if (!(state & kOpen) || (state & ~kOpen) >= participants_limit_ || exhausted()) return false;
  } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel));
  work(deadline_ns);
  leave();
  return true;
}

int Job::copy(size_t piece) {
  if (!digest_) return plan_->copy(piece);
  DigestSum sum = {};
  plan_->copy(piece, *digest_, sum);
  for (int lane = 0; lane < 2; ++lane) digest_lanes_[lane].fetch_add(sum.lanes[lane], std::memory_order_acq_rel);
  return 0;
}

std::optional<DigestSum> Job::digest() const {
  if (!digest_) return std::nullopt;
  return DigestSum{{digest_lanes_[0].load(std::memory_order_acquire), digest_lanes_[1].load(std::memory_order_acquire)}};
}

void Job::work(int64_t deadline_ns) {
  while (state_.load(std::memory_order_acquire) & kOpen) {
    int64_t now = now_ns();
    if (now >= deadline_ns_) {
      end(TIMEOUT);
      return;
    }
    if (now >= deadline_ns) return;
    engine_->expire(now);
    if (int code = plan_->closed()) {
      end(code);
      return;
    }
    size_t piece = cursor_.fetch_add(1, std::memory_order_relaxed);
    if (piece >= plan_->pieces()) return;
    if (int error = copy(piece)) {
      end(error);
      return;
    }
    nbytes_done_.fetch_add(plan_->piece_nbytes(piece), std::memory_order_acq_rel);
    pieces_done_.fetch_add(1, std::memory_order_acq_rel);
  }
}

void Job::leave() {
  uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
  if (before == 1) {
    settle();
    changed_.wake();
  } else if (before == (kOpen | 1) && pieces_done_.load(std::memory_order_acquire) == plan_->pieces()) {
    // The last one out ends it. If the exchange fails, another has come in, or has ended it.
    uint32_t alone = kOpen;
    if (state_.compare_exchange_strong(alone, 0, std::memory_order_acq_rel)) {
      settle();
      announce(DONE);
    }
  } else if ((before & kOpen) && !exhausted()) {
    engine_->wake(1);
  }
}

void Job::settle() {
  plan_->leave();
  settled_.store(true, std::memory_order_release);
  engine_->settled();
}

void Job::announce(int code) {
  std::vector<int> armed;
  {
    std::lock_guard guard(armed_lock_);
    code_.store(code, std::memory_order_release);
    armed.swap(armed_);
  }
  changed_.wake();
  const uint64_t one = 1;
  for (int fd : armed) {
    // A full eventfd (EAGAIN) is readable already: nothing is lost.
    if (write(fd, &one, sizeof one) < 0) errno = 0;
    close(fd);
  }
  engine_->retire(*this);
}

}  // namespace raynixl
