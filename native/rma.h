// Rma: a list of one-sided reads or writes over UCX endpoints (the plan), and one run of it (the job).
#pragma once

#include <cstdint>

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "clock.h"
#include "codes.h"
#include "endpoint.h"
#include "gate.h"

namespace raynixl {

// One way from our memory to the peer's: an endpoint, and the key of each side on its rail.
struct RmaPath {
  std::shared_ptr<Mapping> local;
  std::shared_ptr<RemoteKey> remote;
};

struct RmaRow {
  uint64_t path;
  uint64_t local;
  uint64_t remote;
  uint64_t nbytes;
};

class RmaPlan {
 public:
  // Raises std::invalid_argument if a row leaves the memory of its path, or the list is empty.
  RmaPlan(bool is_write, std::vector<RmaPath> paths, std::vector<RmaRow> rows, std::vector<std::shared_ptr<Gate>> gates);

  uint64_t nbytes() const { return nbytes_; }
  size_t count() const { return count_; }
  bool is_write() const { return is_write_; }
  const std::vector<RmaRow>& rows() const { return rows_; }
  const RmaPath& path(size_t index) const { return paths_[index]; }
  const std::vector<std::shared_ptr<Endpoint>>& endpoints() const { return endpoints_; }
  // The rails that it uses; the first keeps the list of its jobs.
  const std::vector<std::shared_ptr<Rail>>& rails() const { return rails_; }
  bool usable() const;
  // Whether an endpoint was closed, so that the way must be made anew.
  bool is_refused() const;
  // Whether an endpoint lets only one read be under way at a time.
  bool is_limited() const { return is_limited_; }
  // How many operations UCX may have at a time.
  int64_t window() const { return window_; }

  int enter() const { return gates_.enter(); }
  void leave() const { gates_.leave(); }
  int closed() const { return gates_.aborted(); }

 private:
  const bool is_write_;
  uint64_t nbytes_ = 0;
  int64_t window_ = 0;
  bool is_limited_ = false;
  size_t count_ = 0;
  std::vector<RmaPath> paths_;
  std::vector<RmaRow> rows_;  // those too large for one operation are split here
  std::vector<std::shared_ptr<Endpoint>> endpoints_;
  std::vector<std::shared_ptr<Rail>> rails_;
  Gates gates_;
};

class RmaJob : public std::enable_shared_from_this<RmaJob> {
 public:
  // The plan's gates have been entered; the job leaves them.
  RmaJob(std::shared_ptr<const RmaPlan> plan, int64_t deadline_ns);
  ~RmaJob();

  // Post as much as the window allows. Called once by whoever starts the job, then by completions and by its end.
  void pump();

  // Let UCX's own thread carry it on; it is then looked after by the rail.
  void hand_over();

  // Instead of `pump`: post a few operations and look for their end `looks` times at most; whether it has settled.
  bool run_few(int looks);

  // Progress UCX here until the job has settled, nothing has moved for `patience`, or the deadline passes.
  bool progress(int64_t patience_ns, int64_t deadline_ns);

  int code();
  bool settled() const { return settled_.load(); }
  // Whether that is so, and everybody can see with what it has ended.
  bool has_settled() { return code() != PENDING && (settled() || is_forked()); }
  // Bytes of the operations that are complete, taken to be the first ones.
  uint64_t nbytes_done() const;
  int64_t deadline_ns() const { return deadline_ns_; }
  int64_t ended_ns() const { return ended_ns_.load(std::memory_order_acquire); }
  const RmaPlan& plan() const { return *plan_; }

  enum class Waited { ended, timeout, look_up };
  Waited wait(int64_t deadline_ns);
  Waited wait_settled(int64_t deadline_ns);

  // End with `code` unless it has ended. What UCX has taken goes on until it completes or its endpoint is reset.
  bool end(int code);
  bool arm(int fd);

 private:
  friend class Rail;
  // A read of an endpoint that bounds them: what its completion has to give back.
  struct Read {
    RmaJob* job;
    const RmaRow* row;
  };

  static void on_done(void* request, ucp::Status status, void* self);
  static void on_read(void* request, ucp::Status status, void* read);
  bool enter_endpoints();
  void leave_endpoints();
  bool post_rows();
  bool acquire(const RmaRow& row);
  void post(const RmaRow& row);
  void post_flushes();
  void take(ucp::StatusPtr result);
  void release();
  void failed(ucp::Status status);
  void fail(int code);
  void settle();
  bool announce(int code);
  void wake();
  template <typename Ready>
  Waited wait_until(int64_t deadline_ns, Ready is_ready);
  bool is_forked() const;

  const std::shared_ptr<const RmaPlan> plan_;
  const int64_t deadline_ns_;
  const uint32_t generation_;
  std::atomic<int64_t> outstanding_{1};  // operations in UCX, and one for the posting that goes on
  std::atomic<int> code_{PENDING};
  std::atomic<int> error_{0};
  std::atomic<int> pumps_{0};  // calls of pump that are not answered yet
  std::atomic<bool> all_posted_{false};
  size_t cursor_ = 0;        // of whoever pumps
  std::vector<Read> reads_;  // one for each row, if the plan is limited
  std::atomic<int64_t> operations_done_{0};
  std::atomic<int64_t> ended_ns_{0};
  std::atomic<bool> settled_{false};
  std::atomic<int> waiters_{0};
  Futex changed_;  // for waiters, if there are any
  std::mutex armed_lock_;
  std::vector<int> armed_;
  std::list<std::shared_ptr<RmaJob>>::iterator place_;
  std::atomic<bool> is_listed_{false};  // set before the job is handed over; place_ is the rail's
};

}  // namespace raynixl
