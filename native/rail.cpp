#include "rail.h"

#include <cerrno>
#include <csignal>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include "clock.h"
#include "endpoint.h"
#include "job.h"
#include "rma.h"

namespace raynixl {

namespace {

constexpr int kIdleSweeps = 20;
constexpr int64_t kGiveWay = 200'000;  // how long one who drives lets those pass who want to post, in ns
constexpr int64_t kLook = 100'000;  // how long the thread looks for more after the last that happened, in ns
constexpr int64_t kPark = 200'000;  // how long it keeps out of the way of one who drives before it looks again

}  // namespace

void fail_with(const std::string& what, ucp::Status status) {
  throw std::runtime_error(what + ": " + ucp::library().status_string(status));
}

Rail::Rail(ucp::Context context, ucp::Worker worker, int bell)
    : context_(context),
      worker_(worker),
      bell_(fcntl(bell, F_DUPFD_CLOEXEC, 0)),
      generation_(fork_generation()) {
  if (bell_ < 0) throw std::system_error(errno, std::generic_category(), "dup");
  ucp::library();
}

Rail::~Rail() {
  release();
  ::close(bell_);
}

void Rail::release() {
  if (!alive()) return;
  stopping_.store(true);
  if (thread_) {
    signal();
    pthread_join(*thread_, nullptr);
    thread_.reset();
  }
  released_.store(true);
}

void Rail::signal() {
  parked_.wake();
  ucp::library().worker_signal(worker_);
}

bool Rail::serve() {
  if (ucp::library().worker_get_efd(worker_, &efd_) != ucp::kOk) return false;
  sigset_t all, before;
  sigfillset(&all);  // signals belong to the threads that Python knows
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  int error = pthread_create(&thread, nullptr, thread_main, this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) return false;
  pthread_setname_np(thread, "raynixl-ucx");
  thread_ = thread;
  return true;
}

void* Rail::thread_main(void* self) {
  static_cast<Rail*>(self)->run();  // release() joins before the rail goes
  return nullptr;
}

void Rail::run() {
  const ucp::Library& ucp = ucp::library();
  int64_t happened = now_ns();
  while (!stopping_.load()) {
    uint32_t seen = parked_.value();  // before the look: who leaves wakes us afterwards
    if (drivers_.load() > 0) {
      if (!stopping_.load()) parked_.wait(seen, now_ns() + kPark);
      continue;
    }
    give_way();
    if (progress() != 0) {
      happened = now_ns();
    } else if (now_ns() - happened < kLook) {
      sched_yield();
    } else if (ucp.worker_arm(worker_) != ucp::kBusy) {
      pollfd event{efd_, POLLIN, 0};
      if (!stopping_.load()) poll(&event, 1, -1);
      happened = now_ns();
    }
  }
}

bool Rail::usable() const { return !closed_.load(std::memory_order_acquire) && !forked(); }

bool Rail::alive() const { return !released_.load(std::memory_order_acquire) && !forked(); }

bool Rail::forked() const { return generation_ != fork_generation(); }

std::string Rail::address() {
  Use use(*this);
  if (!usable()) throw std::runtime_error("the rail is closed");
  void* packed = nullptr;
  size_t nbytes = 0;
  if (auto status = ucp::library().worker_get_address(worker_, &packed, &nbytes); status != ucp::kOk)
    fail_with("UCX gives no worker address", status);
  std::string copied(static_cast<const char*>(packed), nbytes);
  ucp::library().worker_release_address(worker_, packed);
  return copied;
}

void Rail::give_way() const {
  if (knocking_.load(std::memory_order_relaxed) == 0) return;
  int64_t until = now_ns() + kGiveWay;
  while (knocking_.load(std::memory_order_relaxed) > 0 && now_ns() < until) sched_yield();
}

std::shared_ptr<Endpoint> Rail::connect(const std::string& address) {
  Use use(*this);
  if (!usable()) throw std::runtime_error("the rail is closed");
  auto endpoint = Endpoint::create(shared_from_this(), address);
  {
    std::lock_guard guard(lock_);
    std::erase_if(endpoints_, [](const auto& weak) { return weak.expired(); });
    endpoints_.push_back(endpoint);
  }
  if (!usable()) endpoint->close(CLOSED);  // closed meanwhile
  return endpoint;
}

void Rail::ring() const {
  const uint64_t one = 1;
  // A full eventfd (EAGAIN) is readable already: nothing is lost.
  if (write(bell_, &one, sizeof one) < 0) errno = 0;
}

void Rail::add(const std::shared_ptr<RmaJob>& job) {
  {
    std::lock_guard guard(lock_);
    job->place_ = jobs_.insert(jobs_.end(), job);
    job->is_listed_.store(true);
  }
  if (job->settled()) remove(*job);  // it ended before it was in the list
  if (!watched_.exchange(true)) ring();
}

void Rail::remove(RmaJob& job) {
  std::shared_ptr<RmaJob> dropped;  // released after the lock
  std::lock_guard guard(lock_);
  if (!job.is_listed_.exchange(false)) return;
  dropped = std::move(*job.place_);
  jobs_.erase(job.place_);
}

bool Rail::sweep(int64_t grace_ns) {
  if (forked()) return false;
  std::vector<std::shared_ptr<RmaJob>> jobs;
  {
    std::lock_guard guard(lock_);
    jobs.assign(jobs_.begin(), jobs_.end());
  }
  int64_t now = now_ns();
  for (const auto& job : jobs) {
    if (job->code() == PENDING)
      if (int code = job->plan().closed()) job->end(code);
    if (job->code() == PENDING || job->settled() || now - job->ended_ns() < grace_ns) continue;
    for (const auto& endpoint : job->plan().endpoints()) endpoint->close(RESET);
  }
  idle_sweeps_ = jobs.empty() ? idle_sweeps_ + 1 : 0;
  if (idle_sweeps_ < kIdleSweeps) return true;
  idle_sweeps_ = 0;
  watched_.store(false);
  std::lock_guard guard(lock_);
  return !jobs_.empty() && !watched_.exchange(true);  // one has come meanwhile, and has not rung
}

std::vector<std::shared_ptr<Endpoint>> Rail::endpoints() {
  std::vector<std::shared_ptr<Endpoint>> alive;
  std::lock_guard guard(lock_);
  for (const auto& weak : endpoints_)
    if (auto endpoint = weak.lock()) alive.push_back(std::move(endpoint));
  return alive;
}

bool Rail::close(int64_t deadline_ns) {
  if (forked()) return false;
  closed_.store(true);
  for (const auto& endpoint : endpoints()) endpoint->close(CLOSED);
  for (;;) {
    bool any = inflight_.load() > 0 || drivers_.load() > 0;
    for (const auto& endpoint : endpoints()) any |= !endpoint->is_gone();
    if (!any) return true;
    if (now_ns() >= deadline_ns) return false;
    if (progress() == 0) usleep(100);
  }
}

Mapping::Mapping(std::shared_ptr<Rail> rail, uint64_t address, uint64_t nbytes, int memory_type)
    : rail_(std::move(rail)), address_(address), nbytes_(nbytes), memory_type_(memory_type) {
  Rail::Use use(*rail_);
  if (!rail_->usable()) throw std::runtime_error("the rail is closed");
  ucp::MemMapParams params{};
  params.field_mask = ucp::kMapAddress | ucp::kMapLength | ucp::kMapMemoryType;
  params.address = reinterpret_cast<void*>(address);
  params.length = nbytes;
  params.memory_type = memory_type;
  if (auto status = ucp::library().mem_map(rail_->context(), &params, &memh_); status != ucp::kOk)
    fail_with("UCX does not map " + std::to_string(nbytes) + " bytes", status);
}

std::string Mapping::key() const {
  void* packed = nullptr;
  size_t nbytes = 0;
  if (memh_ == nullptr) throw std::runtime_error("the mapping is gone");
  if (auto status = ucp::library().rkey_pack(rail_->context(), memh_, &packed, &nbytes); status != ucp::kOk)
    fail_with("UCX packs no key", status);
  std::string copied(static_cast<const char*>(packed), nbytes);
  ucp::library().rkey_buffer_release(packed);
  return copied;
}

void Mapping::unmap() {
  ucp::Memh memh = std::exchange(memh_, nullptr);
  if (memh != nullptr && rail_->alive()) ucp::library().mem_unmap(rail_->context(), memh);
}

}  // namespace raynixl
