// Rail: one UCX worker of this process, the memory mapped for it, and the endpoints to peers made on it.
#pragma once

#include <cstdint>

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <pthread.h>

#include "clock.h"
#include "codes.h"
#include "cuda.h"
#include "ucp_abi.h"

namespace raynixl {

class Endpoint;
class RmaJob;

class Rail : public std::enable_shared_from_this<Rail> {
 public:
  // The handles stay the caller's, and must live until `close` has returned true. `bell` is an eventfd that is rung
  // when a job needs looking after and when an endpoint has failed; it is duplicated.
  Rail(ucp::Context context, ucp::Worker worker, int bell);
  Rail(const Rail&) = delete;
  ~Rail();

  std::string address();
  std::shared_ptr<Endpoint> connect(const std::string& address);

  ucp::Context context() const { return context_; }
  ucp::Worker worker() const { return worker_; }
  bool usable() const;
  // Whether this is a fork of the process that made it: UCX's sockets and locks are the parent's.
  bool forked() const;
  unsigned progress() const {
    take_cuda_context();
    return ucp::library().worker_progress(worker_);
  }
  void signal();
  // Whoever has driven does so no more, and something is still to come: the thread need not wait out its time.
  void take_over() { parked_.wake(); }
  void ring() const;

  // Start the thread that serves peers and what was handed over. It sleeps while nothing happens, and looks for a
  // moment before it does: waking takes longer than an answer over TCP. False if it cannot be started.
  bool serve();

  // Whoever is inside progresses the worker himself: the thread keeps out of his way.
  class Driver {
   public:
    explicit Driver(Rail& rail) : rail_(rail) { rail_.drivers_.fetch_add(1); }
    Driver(const Driver&) = delete;
    ~Driver() { rail_.drivers_.fetch_sub(1); }

   private:
    Rail& rail_;
  };

  // Count what `close` must wait for: calls that post, and jobs up to the last operation that UCX has completed.
  void begin() { inflight_.fetch_add(1); }
  void end() { inflight_.fetch_sub(1); }

  // Keeps the worker from being destroyed under a call that uses it. `usable` is asked inside.
  class Use {
   public:
    explicit Use(Rail& rail) : rail_(rail) { rail_.begin(); }
    Use(const Use&) = delete;
    ~Use() { rail_.end(); }

   private:
    Rail& rail_;
  };
  // Whether nobody else posts, waits or has anything under way, but `uses` calls of one's own.
  bool is_quiet(int uses) const { return inflight_.load() <= uses && drivers_.load() == 0; }

  // One who wants to post between two rounds of those who drive: UCX's lock is not fair.
  void knock() { knocking_.fetch_add(1); }
  void come_in() { knocking_.fetch_sub(1); }
  void give_way() const;

  // A job that goes on after its caller has left; one that has settled.
  void add(const std::shared_ptr<RmaJob>& job);
  void remove(RmaJob& job);

  // End jobs whose deadline has passed or whose gates were closed with abort, and reset the endpoints of those that
  // were ended longer than `grace` ago and still go on. False once there have been no jobs for many sweeps: the bell
  // rings when there are some again.
  bool sweep(int64_t grace_ns);

  // Post nothing more and close every endpoint; true once all are gone and no job is left. Keys and mappings can still be given back.
  bool close(int64_t deadline_ns);
  // The worker is about to be destroyed: touch it no more. Joins the thread.
  void release();
  bool alive() const;

 private:
  static void* thread_main(void* self);
  void run();
  std::vector<std::shared_ptr<Endpoint>> endpoints();

  const ucp::Context context_;
  const ucp::Worker worker_;
  const int bell_;
  const uint32_t generation_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> released_{false};
  std::atomic<bool> watched_{false};  // whether somebody sweeps
  int idle_sweeps_ = 0;               // of whoever sweeps
  std::atomic<int> drivers_{0};
  std::atomic<int> inflight_{0};
  std::atomic<int> knocking_{0};
  std::atomic<bool> stopping_{false};
  Futex parked_;  // the thread sleeps here while somebody drives
  int efd_ = -1;  // UCX's, readable when there is something to progress
  std::optional<pthread_t> thread_;
  std::mutex lock_;  // protects what follows; held for list operations only
  std::list<std::shared_ptr<RmaJob>> jobs_;
  std::vector<std::weak_ptr<Endpoint>> endpoints_;
};

// Memory of this process that UCX may read and write, on one rail.
class Mapping {
 public:
  Mapping(std::shared_ptr<Rail> rail, uint64_t address, uint64_t nbytes, int memory_type);
  Mapping(const Mapping&) = delete;
  ~Mapping() { unmap(); }

  std::string key() const;
  void unmap();
  bool holds(uint64_t address, uint64_t nbytes) const {
    return address >= address_ && nbytes <= nbytes_ && address - address_ <= nbytes_ - nbytes;
  }
  ucp::Memh memh() const { return memh_; }
  int memory_type() const { return memory_type_; }

 private:
  const std::shared_ptr<Rail> rail_;
  const uint64_t address_, nbytes_;
  const int memory_type_;
  ucp::Memh memh_ = nullptr;
};

// Throws what UCX answered as std::runtime_error.
[[noreturn]] void fail_with(const std::string& what, ucp::Status status);

}  // namespace raynixl
