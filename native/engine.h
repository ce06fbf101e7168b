// Engine: a few threads that copy for whoever runs a plan; asleep while there is nothing to do.
#pragma once

#include <cstdint>

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include <pthread.h>

#include "job.h"

namespace raynixl {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  explicit Engine(int threads);

  int threads() const { return threads_; }
  bool usable() const { return !closing_.load(std::memory_order_acquire) && generation_ == fork_generation(); }

  // Queue a plan whose gates have been entered and wake the threads it needs. Null if closed: the gates are left.
  std::shared_ptr<Job> post(std::shared_ptr<const Plan> plan, int64_t deadline_ns,
                            std::optional<Plan::Digest> digest = std::nullopt);

  // End all jobs with CLOSED and wait for the threads to go. Idempotent. True if everything ended in time.
  bool close(int64_t deadline_ns);

  // From a job: a place has become free while pieces remain; it is no longer pending; nobody is inside any more.
  void wake(int count);
  void retire(Job& job);
  void settled();

  // End the jobs whose deadline has passed, if there are any.
  void expire(int64_t now);

 private:
  static void* thread_main(void* argument);
  void serve();
  std::shared_ptr<Job> find_job() const;
  void enlist(const std::shared_ptr<Job>& job);
  void start_threads(int wanted);
  void join_threads();

  const int threads_;
  const uint32_t generation_;
  std::atomic<bool> closing_{false};
  std::atomic<int64_t> next_deadline_{INT64_MAX};
  std::atomic<int> unsettled_{0};
  Futex work_;   // changes when there may be something to do
  Futex quiet_;  // changes when a thread goes or, while closing, a job settles

  std::mutex lock_;  // protects what follows; held for list operations and the start of threads only
  std::list<std::shared_ptr<Job>> jobs_;  // pending ones, oldest first
  std::vector<pthread_t> handles_;
  int idle_ = 0;
  int live_ = 0;
};

}  // namespace raynixl
