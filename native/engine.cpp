#include "engine.h"

#include <algorithm>
#include <cerrno>
#include <csignal>

namespace raynixl {

namespace {

constexpr uint64_t kBytesPerThread = 2 << 20;  // less than this is copied before another thread has woken

}  // namespace

Engine::Engine(int threads) : threads_(threads), generation_(fork_generation()) {}

std::shared_ptr<Job> Engine::post(std::shared_ptr<const Plan> plan, int64_t deadline_ns,
                                  std::optional<Plan::Digest> digest) {
  int wanted = int(std::min<uint64_t>(uint64_t(threads_), (plan->nbytes() - 1) / kBytesPerThread + 1));
  auto job = std::make_shared<Job>(shared_from_this(), plan, deadline_ns, wanted, digest);
  int wakes = 0;
  bool served = false;
  bool open = false;
  if (usable()) {
    std::lock_guard guard(lock_);
    open = !closing_;
    if (open) {
      enlist(job);
      start_threads(std::min(wanted - idle_, threads_ - live_));
      wakes = std::min(wanted, idle_);
      served = live_ > 0;
    }
  }
  if (!open) {
    plan->leave();
    return nullptr;
  }
  if (wakes > 0) work_.wake(wakes);
  if (!served) job->end(-EAGAIN);  // not even one thread could be started
  return job;
}

void Engine::enlist(const std::shared_ptr<Job>& job) {
  job->place_ = jobs_.insert(jobs_.end(), job);
  job->listed_ = true;
  unsettled_.fetch_add(1);
  if (job->deadline_ns() < next_deadline_.load()) next_deadline_.store(job->deadline_ns());
}

void Engine::start_threads(int wanted) {
  if (wanted <= 0) return;
  // Signals belong to the threads that Python knows.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; wanted > 0; --wanted) {
    pthread_t handle;
    auto* self = new std::shared_ptr<Engine>(shared_from_this());
    if (pthread_create(&handle, nullptr, thread_main, self) != 0) {
      delete self;
      break;
    }
    pthread_setname_np(handle, "raynixl-copy");
    handles_.push_back(handle);
    ++live_;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void* Engine::thread_main(void* argument) {
  auto* held = static_cast<std::shared_ptr<Engine>*>(argument);
  std::shared_ptr<Engine> self = std::move(*held);
  delete held;
  self->serve();
  return nullptr;
}

std::shared_ptr<Job> Engine::find_job() const {
  for (const auto& job : jobs_)
    if (job->has_place()) return job;
  return nullptr;
}

void Engine::serve() {
  std::unique_lock guard(lock_);
  while (!closing_) {
    if (std::shared_ptr<Job> job = find_job()) {
      guard.unlock();
      job->participate(INT64_MAX);
      job.reset();
      guard.lock();
    } else {
      uint32_t ticket = work_.value();
      ++idle_;
      guard.unlock();
      work_.wait(ticket, INT64_MAX);
      guard.lock();
      --idle_;
    }
  }
  --live_;
  guard.unlock();
  quiet_.wake();
}

void Engine::wake(int count) { work_.wake(count); }

void Engine::retire(Job& job) {
  std::shared_ptr<Job> dropped;  // released after the lock
  std::lock_guard guard(lock_);
  if (!job.listed_) return;
  job.listed_ = false;
  dropped = std::move(*job.place_);
  jobs_.erase(job.place_);
}

void Engine::settled() {
  if (unsettled_.fetch_sub(1) == 1 && closing_.load()) quiet_.wake();
}

void Engine::expire(int64_t now) {
  if (now < next_deadline_.load(std::memory_order_relaxed)) return;
  std::vector<std::shared_ptr<Job>> late;
  {
    std::lock_guard guard(lock_);
    int64_t next = INT64_MAX;
    for (const auto& job : jobs_) {
      if (job->deadline_ns() <= now)
        late.push_back(job);
      else
        next = std::min(next, job->deadline_ns());
    }
    next_deadline_.store(next);
  }
  for (const auto& job : late) job->end(TIMEOUT);
}

bool Engine::close(int64_t deadline_ns) {
  if (generation_ != fork_generation()) return true;
  std::vector<std::shared_ptr<Job>> jobs;
  {
    std::lock_guard guard(lock_);
    closing_.store(true);
    jobs.assign(jobs_.begin(), jobs_.end());
  }
  for (const auto& job : jobs) job->end(CLOSED);
  work_.wake();
  for (;;) {
    uint32_t seen = quiet_.value();
    {
      std::lock_guard guard(lock_);
      if (live_ == 0 && unsettled_.load() == 0) break;
    }
    if (now_ns() >= deadline_ns) return false;
    quiet_.wait(seen, deadline_ns);
  }
  join_threads();
  return true;
}

void Engine::join_threads() {
  std::vector<pthread_t> handles;
  {
    std::lock_guard guard(lock_);
    handles.swap(handles_);
  }
  for (pthread_t handle : handles) pthread_join(handle, nullptr);  // they have left serve(): momentary
}

}  // namespace raynixl
