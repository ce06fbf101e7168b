// Job: one run of a plan by several threads; ends exactly once, with one code.
#pragma once

#include <cstdint>

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "clock.h"
#include "codes.h"
#include "plan.h"

namespace raynixl {

class Engine;

// How many times this process has been forked off its ancestors: threads and locks of an older count are gone.
uint32_t fork_generation();

class Job : public std::enable_shared_from_this<Job> {
 public:
  // The plan's gates have been entered; the job leaves them.
  Job(std::shared_ptr<Engine> engine, std::shared_ptr<const Plan> plan, int64_t deadline_ns, int participants,
      std::optional<Plan::Digest> digest);
  ~Job();

  // The code so far; a job past its deadline ends here with TIMEOUT.
  int code();
  // Whether it has ended and nobody copies for it any more: its gates have been left.
  bool settled() { return code() != PENDING && (forked() || settled_.load(std::memory_order_acquire)); }
  uint64_t nbytes_done() const { return nbytes_done_.load(std::memory_order_acquire); }
  // The digest of all that was copied; none if none was wanted. For a job that is done.
  std::optional<DigestSum> digest() const;
  int64_t deadline_ns() const { return deadline_ns_; }

  enum class Waited { ended, timeout, look_up };
  // Wait for the end, copying meanwhile if a participant's place is free. Returns look_up now and then, so that
  // the caller can see to its signals and come back.
  Waited wait(int64_t deadline_ns);

  // Wait until it has ended and nobody copies for it any more, without helping.
  Waited wait_settled(int64_t deadline_ns);

  // End with `code` unless it has ended; threads inside stop at their next piece.
  bool end(int code);

  // Write 1 to the eventfd when the job ends; false if it has. The descriptor is duplicated: the caller may
  // close its own at any time. Raises std::system_error.
  bool arm(int fd);

  // Take a participant's place and copy pieces until none is left or the deadline passes; false if no place is free.
  bool participate(int64_t deadline_ns);

  bool has_place() const;

 private:
  friend class Engine;
  static constexpr uint32_t kOpen = 1u << 31;

  bool forked() const { return generation_ != fork_generation(); }
  bool exhausted() const { return cursor_.load(std::memory_order_relaxed) >= plan_->pieces(); }
  int copy(size_t piece);
  void work(int64_t deadline_ns);
  void leave();
  void settle();
  void announce(int code);

  const std::shared_ptr<Engine> engine_;
  const std::shared_ptr<const Plan> plan_;
  const int64_t deadline_ns_;
  const uint32_t participants_limit_;
  const uint32_t generation_;
  const std::optional<Plan::Digest> digest_;

  // Threads inside, and kOpen until the job is being ended. Whoever brings it to 0 leaves the gates.
  std::atomic<uint32_t> state_{kOpen};
  std::atomic<int> code_{PENDING};
  std::atomic<size_t> cursor_{0};
  std::atomic<size_t> pieces_done_{0};
  std::atomic<uint64_t> nbytes_done_{0};
  std::atomic<uint64_t> digest_lanes_[2] = {};
  std::atomic<bool> settled_{false};
  Futex changed_;  // when it ends, and when nobody is inside any more

  std::mutex armed_lock_;  // protects armed_, and code_ against ending while a descriptor is added
  std::vector<int> armed_;

  // Place in the engine's list of jobs, under the engine's lock.
  std::list<std::shared_ptr<Job>>::iterator place_;
  bool listed_ = false;
};

}  // namespace raynixl
