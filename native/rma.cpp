#include "rma.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include "job.h"

namespace raynixl {

namespace {

constexpr uint64_t kPiece = 8 << 20;           // what one operation moves at most, so that a cancel waits for little
constexpr uint64_t kSmallPiece = 1 << 10;      // and at least, where an endpoint bounds a read
constexpr uint64_t kWindowNbytes = 64 << 20;   // bytes, and
constexpr int64_t kWindowRows = 2048;          // operations that UCX has at a time: each costs it some 500 bytes
constexpr int64_t kLookUp = 100'000'000;       // how long a waiter stays away from Python's signals, in ns
constexpr int kLooksBeforeFlush = 2;
constexpr int64_t kLook = 50'000;              // how long a waiter looks for news before it sleeps: waking takes as long

// Rows in an order that takes the paths in turn: where each lets one read pass at a time, none waits for another.
std::vector<RmaRow> in_turn(const std::vector<RmaRow>& rows, size_t paths) {
  std::vector<std::vector<RmaRow>> lanes(paths);
  for (const RmaRow& row : rows) lanes[row.path].push_back(row);
  std::vector<RmaRow> ordered;
  ordered.reserve(rows.size());
  for (size_t i = 0; ordered.size() < rows.size(); ++i)
    for (const auto& lane : lanes)
      if (i < lane.size()) ordered.push_back(lane[i]);
  return ordered;
}

// Drives every rail of a plan for as long as it lives; nearly always it is one.
class Drivers {
 public:
  explicit Drivers(const std::vector<std::shared_ptr<Rail>>& rails) : first_(*rails.front()) {
    for (size_t i = 1; i < rails.size(); ++i) others_.push_back(std::make_unique<Rail::Driver>(*rails[i]));
  }

 private:
  Rail::Driver first_;
  std::vector<std::unique_ptr<Rail::Driver>> others_;
};

}  // namespace

RmaPlan::RmaPlan(bool is_write, std::vector<RmaPath> paths, std::vector<RmaRow> rows,
                 std::vector<std::shared_ptr<Gate>> gates)
    : is_write_(is_write), count_(rows.size()), paths_(std::move(paths)), gates_(std::move(gates)) {
  if (rows.empty() || paths_.empty()) throw std::invalid_argument("a program needs at least one segment");
  for (const RmaRow& row : rows) {
    if (row.path >= paths_.size()) throw std::invalid_argument("a segment without a path");
    if (row.nbytes == 0) throw std::invalid_argument("a segment of 0 bytes");
    if (!paths_[row.path].local->holds(row.local, row.nbytes))
      throw std::invalid_argument("a segment outside our memory");
    if (!paths_[row.path].remote->holds(row.remote, row.nbytes))
      throw std::invalid_argument("a segment outside the peer's memory");
    nbytes_ += row.nbytes;
    uint64_t limit = is_write_ ? 0 : paths_[row.path].remote->endpoint()->read_limit();
    uint64_t piece = limit == 0 ? kPiece : std::clamp(limit, kSmallPiece, kPiece);
    is_limited_ = is_limited_ || limit != 0;
    for (uint64_t at = 0; at < row.nbytes; at += piece)
      rows_.push_back({row.path, row.local + at, row.remote + at, std::min(piece, row.nbytes - at)});
  }
  for (const RmaPath& path : paths_) {
    const auto& endpoint = path.remote->endpoint();
    if (std::find(endpoints_.begin(), endpoints_.end(), endpoint) == endpoints_.end()) endpoints_.push_back(endpoint);
    if (std::find(rails_.begin(), rails_.end(), endpoint->rail()) == rails_.end()) rails_.push_back(endpoint->rail());
  }
  if (is_limited_ && paths_.size() > 1) rows_ = in_turn(rows_, paths_.size());
  window_ = std::clamp<int64_t>(int64_t(kWindowNbytes / (nbytes_ / rows_.size() + 1)), 4, kWindowRows);
}

bool RmaPlan::usable() const {
  return std::all_of(rails_.begin(), rails_.end(), [](const auto& rail) { return rail->usable(); });
}

bool RmaPlan::is_refused() const {
  return std::any_of(endpoints_.begin(), endpoints_.end(), [](const auto& endpoint) { return endpoint->is_refused(); });
}

RmaJob::RmaJob(std::shared_ptr<const RmaPlan> plan, int64_t deadline_ns)
    : plan_(std::move(plan)), deadline_ns_(deadline_ns), generation_(fork_generation()) {
  plan_->rails().front()->begin();
  if (plan_->is_limited())
    for (const RmaRow& row : plan_->rows()) reads_.push_back({this, &row});
}

RmaJob::~RmaJob() {
  for (int fd : armed_) close(fd);
}

bool RmaJob::is_forked() const { return generation_ != fork_generation(); }

void RmaJob::pump() {
  if (pumps_.fetch_add(1) > 0) return;  // whoever pumps goes round once more
  bool is_mine = false;
  int seen;
  do {
    seen = pumps_.load();
    if (!all_posted_.load() && post_rows()) {
      all_posted_.store(true);
      is_mine = true;
    }
  } while (pumps_.fetch_sub(seen) != seen);
  if (is_mine) release();
}

bool RmaJob::run_few(int looks) {
  Drivers drivers(plan_->rails());
  // Nobody else posts: the hold is ours. UCX completes a flush at once if all is done, and only at its next progress
  // if it is asked before.
  all_posted_.store(true);
  bool is_open = enter_endpoints();
  if (is_open) {
    for (const RmaRow& row : plan_->rows()) post(row);
    // By cma it is done after a look. Over TCP a write is done when it is acknowledged, and a flush that is asked for
    // only then costs a second round trip.
    for (int few = kLooksBeforeFlush; outstanding_.load() > 1 && few > 0; --few, --looks)
      for (const auto& rail : plan_->rails()) rail->progress();
    if (plan_->is_write()) post_flushes();
    leave_endpoints();
  }
  release();
  for (; looks > 0 && !settled(); --looks)
    for (const auto& rail : plan_->rails()) rail->progress();
  return settled();
}

bool RmaJob::enter_endpoints() {
  take_cuda_context();
  for (const auto& rail : plan_->rails()) rail->knock();
  const auto& endpoints = plan_->endpoints();
  for (size_t i = 0; i < endpoints.size(); ++i) {
    int code = endpoints[i]->enter();
    if (code == 0) continue;
    while (i > 0) endpoints[--i]->leave();
    for (const auto& rail : plan_->rails()) rail->come_in();
    fail(code);
    return false;
  }
  return true;
}

void RmaJob::leave_endpoints() {
  for (const auto& endpoint : plan_->endpoints()) endpoint->leave();
  for (const auto& rail : plan_->rails()) rail->come_in();
}

// Post until the window is full (false) or nothing more is to be posted (true).
bool RmaJob::post_rows() {
  const auto& rows = plan_->rows();
  if (!enter_endpoints()) return true;
  bool is_over = false;
  while (!is_over && outstanding_.load(std::memory_order_relaxed) <= plan_->window()) {
    is_over = cursor_ == rows.size() || error_.load(std::memory_order_relaxed) != 0 ||
              code_.load(std::memory_order_relaxed) != PENDING;
    if (is_over) break;
    if (plan_->is_limited() && !acquire(rows[cursor_])) break;  // it goes on once there is room
    post(rows[cursor_++]);
  }
  // Also after an error: what has left this process must have landed before anyone may believe that it is over.
  if (is_over && plan_->is_write() && cursor_ > 0) post_flushes();
  leave_endpoints();
  return is_over;
}

bool RmaJob::acquire(const RmaRow& row) {
  return plan_->path(row.path).remote->endpoint()->acquire(shared_from_this());
}

void RmaJob::post(const RmaRow& row) {
  const RmaPath& path = plan_->path(row.path);
  Endpoint& endpoint = *path.remote->endpoint();
  const bool is_limited = plan_->is_limited();
  if (endpoint.is_refused()) {
    fail(endpoint.code());
    if (is_limited) endpoint.give_back();
    return;
  }
  const ucp::Library& ucp = ucp::library();
  ucp::RequestParam param{};
  param.op_attr_mask = ucp::kFieldCallback | ucp::kFieldUserData | ucp::kFieldMemh | ucp::kFieldMemoryType;
  if (plan_->rows().size() > 1) param.op_attr_mask |= ucp::kMultiSend;
  param.send = is_limited ? on_read : on_done;
  param.user_data = is_limited ? static_cast<void*>(&reads_[size_t(&row - plan_->rows().data())]) : this;
  param.memory_type = path.local->memory_type();
  param.memh = path.local->memh();
  outstanding_.fetch_add(1);
  auto* local = reinterpret_cast<void*>(row.local);
  ucp::StatusPtr result =
      plan_->is_write() ? ucp.put_nbx(endpoint.handle(), local, row.nbytes, row.remote, path.remote->handle(), &param)
                        : ucp.get_nbx(endpoint.handle(), local, row.nbytes, row.remote, path.remote->handle(), &param);
  if (is_limited && (result == nullptr || ucp::is_error(result))) endpoint.give_back();
  take(result);
}

void RmaJob::post_flushes() {
  ucp::RequestParam param{};
  param.op_attr_mask = ucp::kFieldCallback | ucp::kFieldUserData;
  param.send = on_done;
  param.user_data = this;
  for (const auto& endpoint : plan_->endpoints()) {
    if (endpoint->is_refused()) {
      fail(endpoint->code());
      continue;
    }
    outstanding_.fetch_add(1);
    take(ucp::library().ep_flush_nbx(endpoint->handle(), &param));
  }
}

// Hear what a call that was counted returned: done at once, failed at once, or later by on_done.
void RmaJob::take(ucp::StatusPtr result) {
  if (result != nullptr && !ucp::is_error(result)) return;
  if (result != nullptr) failed(ucp::error_of(result));
  operations_done_.fetch_add(1, std::memory_order_relaxed);
  outstanding_.fetch_sub(1);  // not the last: whoever posts holds one
}

void RmaJob::on_done(void* request, ucp::Status status, void* self) {
  ucp::library().request_free(request);
  auto* job = static_cast<RmaJob*>(self);
  if (status != ucp::kOk) job->failed(status);
  job->operations_done_.fetch_add(1, std::memory_order_relaxed);
  // Once it has let go, the completions of another rail may end the job and drop it.
  std::shared_ptr<RmaJob> kept = job->all_posted_.load() ? nullptr : job->shared_from_this();
  int64_t left = job->outstanding_.fetch_sub(1) - 1;
  if (left == 0) return job->settle();
  if (kept && left - 1 <= job->plan_->window() / 2) job->pump();
}

void RmaJob::on_read(void* request, ucp::Status status, void* read) {
  auto [job, row] = *static_cast<Read*>(read);
  std::shared_ptr<Endpoint> endpoint = job->plan_->path(row->path).remote->endpoint();
  on_done(request, status, job);  // it may be the job's last
  endpoint->give_back();
}

void RmaJob::release() {
  if (outstanding_.fetch_sub(1) == 1) settle();
}

// The first error is the one that counts. What an endpoint that we closed says is not UCX's word but ours.
void RmaJob::failed(ucp::Status status) {
  for (const auto& endpoint : plan_->endpoints())
    if (int code = endpoint->code()) return fail(code);
  switch (status) {
    case ucp::kNoMemory: return fail(-ENOMEM);
    case ucp::kUnsupported: return fail(-EOPNOTSUPP);
    case ucp::kInvalidAddress: return fail(-EFAULT);
    default: break;
  }
  for (const auto& endpoint : plan_->endpoints()) endpoint->failed(status);
  fail(LOST);
}

void RmaJob::fail(int code) {
  int none = 0;
  error_.compare_exchange_strong(none, code);
}

void RmaJob::settle() {
  // Whoever sees that it has settled may drop it.
  std::shared_ptr<RmaJob> self = shared_from_this();
  plan_->leave();
  plan_->rails().front()->end();
  settled_.store(true);
  int error = error_.load();
  announce(error != 0 ? error : int(DONE));
  wake();
  if (is_listed_.load()) plan_->rails().front()->remove(*this);
}

bool RmaJob::announce(int code) {
  std::vector<int> armed;
  {
    std::lock_guard guard(armed_lock_);
    if (code_.load(std::memory_order_relaxed) != PENDING) return false;
    if (!settled()) ended_ns_.store(now_ns(), std::memory_order_release);
    code_.store(code);
    armed.swap(armed_);
  }
  wake();
  const uint64_t one = 1;
  for (int fd : armed) {
    if (write(fd, &one, sizeof one) < 0) errno = 0;  // full: it is readable already
    close(fd);
  }
  return true;
}

bool RmaJob::end(int code) {
  if (is_forked() || !announce(code)) return false;
  pump();                          // nothing more is to be posted, and it may be all that is waited for
  plan_->rails().front()->ring();  // if UCX does not let go of it soon, its endpoints are reset
  return true;
}

int RmaJob::code() {
  int code = code_.load(std::memory_order_acquire);
  if (code != PENDING) return code;
  if (is_forked()) return CLOSED;
  if (now_ns() >= deadline_ns_) end(TIMEOUT);
  return code_.load(std::memory_order_acquire);
}

uint64_t RmaJob::nbytes_done() const {
  size_t done = std::min<size_t>(size_t(operations_done_.load()), plan_->rows().size());
  uint64_t nbytes = 0;
  for (size_t i = 0; i < done; ++i) nbytes += plan_->rows()[i].nbytes;
  return nbytes;
}

void RmaJob::hand_over() {
  plan_->rails().front()->add(shared_from_this());
  for (const auto& rail : plan_->rails()) rail->signal();
}

bool RmaJob::progress(int64_t patience_ns, int64_t deadline_ns) {
  Drivers drivers(plan_->rails());
  int64_t quiet_since = 0;
  while (!settled()) {
    unsigned events = 0;
    for (const auto& rail : plan_->rails()) {
      rail->give_way();
      events += rail->progress();
    }
    if (events != 0) {
      quiet_since = 0;
      if (now_ns() >= deadline_ns) return settled();
      continue;
    }
    int64_t now = now_ns();
    if (quiet_since == 0) quiet_since = now;
    if (now - quiet_since >= patience_ns || now >= deadline_ns) return settled();
  }
  return true;
}

RmaJob::Waited RmaJob::wait(int64_t deadline_ns) {
  return wait_until(deadline_ns, [this] { return code() != PENDING; });
}

RmaJob::Waited RmaJob::wait_settled(int64_t deadline_ns) {
  return wait_until(deadline_ns, [this] { return has_settled(); });
}

// A waiter drives UCX as long as something moves: UCX's own thread would first have to wake, and then to wake us.
template <typename Ready>
RmaJob::Waited RmaJob::wait_until(int64_t deadline_ns, Ready is_ready) {
  int64_t look_up = now_ns() + kLookUp;
  int64_t until = std::min(deadline_ns, look_up);
  if (code() == PENDING) until = std::min(until, deadline_ns_);
  if (plan_->usable()) progress(kLook, until);
  if (is_ready()) return Waited::ended;
  if (now_ns() >= look_up) return Waited::look_up;
  for (const auto& rail : plan_->rails()) rail->take_over();
  for (;;) {
    waiters_.fetch_add(1);
    uint32_t seen = changed_.value();
    int64_t now = now_ns();
    bool is_over = is_ready() || now >= deadline_ns;
    int64_t until = std::min(deadline_ns, now + kLookUp);
    if (code_.load() == PENDING) until = std::min(until, deadline_ns_);
    bool is_quiet = is_over || changed_.wait(seen, until);
    waiters_.fetch_sub(1);
    if (is_over) return is_ready() ? Waited::ended : Waited::timeout;
    if (!is_quiet) return Waited::look_up;
  }
}

void RmaJob::wake() {
  if (waiters_.load() > 0) changed_.wake();
}

bool RmaJob::arm(int fd) {
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

}  // namespace raynixl
