#include "endpoint.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "rma.h"

namespace raynixl {

std::shared_ptr<Endpoint> Endpoint::create(std::shared_ptr<Rail> rail, const std::string& address) {
  auto endpoint = std::make_shared<Endpoint>(rail);
  ucp::EpParams params{};
  params.field_mask = ucp::kEpAddress | ucp::kEpErrMode | ucp::kEpErrHandler;
  params.address = address.data();
  params.err_mode = ucp::kErrModePeer;
  params.err_callback = on_error;
  params.err_arg = endpoint.get();
  endpoint->self_ = endpoint;
  ucp::Ep ep = nullptr;
  if (auto status = ucp::library().ep_create(rail->worker(), &params, &ep); status != ucp::kOk) {
    endpoint->gone_.store(true);
    endpoint->self_.reset();
    fail_with("UCX makes no endpoint", status);
  }
  endpoint->ep_.store(ep);
  return endpoint;
}

void Endpoint::on_error(void* self, ucp::Ep, ucp::Status status) { static_cast<Endpoint*>(self)->failed(status); }

void Endpoint::failed(ucp::Status status) {
  ucp::Status none = ucp::kOk;
  if (status_.compare_exchange_strong(none, status, std::memory_order_acq_rel)) rail_->ring();
}

void Endpoint::close(int code) {
  if (rail_->forked()) return;
  int open = 0;
  if (!code_.compare_exchange_strong(open, code, std::memory_order_acq_rel)) return;
  uint32_t before = posters_.fetch_or(kClosed, std::memory_order_acq_rel);
  if (before == 0) close_handle();  // else the last who posts does it, at his next row
  rail_->ring();
}

void Endpoint::close_handle() {
  ucp::Ep ep = ep_.exchange(nullptr);
  if (ep == nullptr) return;
  ucp::RequestParam param{};
  param.op_attr_mask = ucp::kFieldCallback | ucp::kFieldUserData | ucp::kFieldFlags;
  param.flags = ucp::kCloseForce;
  param.send = on_closed;
  param.user_data = this;
  ucp::StatusPtr request = ucp::library().ep_close_nbx(ep, &param);
  rail_->signal();  // even if it is closed at once, UCX ends what was in flight only at its next progress
  if (request == nullptr || ucp::is_error(request)) on_closed(nullptr, ucp::kOk, this);
}

void Endpoint::on_closed(void* request, ucp::Status, void* self) {
  if (request != nullptr) ucp::library().request_free(request);
  auto* endpoint = static_cast<Endpoint*>(self);
  std::shared_ptr<Endpoint> kept = std::move(endpoint->self_);
  endpoint->gone_.store(true, std::memory_order_release);
}

bool Endpoint::acquire(const std::shared_ptr<RmaJob>& job) {
  if (read_limit() == 0) return true;
  std::lock_guard guard(reads_lock_);
  if (!is_reading_) return is_reading_ = true;
  if (std::find(waiting_.begin(), waiting_.end(), job) == waiting_.end()) waiting_.push_back(job);
  return false;
}

void Endpoint::give_back() {
  if (read_limit() == 0) return;
  std::vector<std::shared_ptr<RmaJob>> waiting;
  {
    std::lock_guard guard(reads_lock_);
    is_reading_ = false;
    waiting.swap(waiting_);
  }
  for (const auto& job : waiting) job->pump();
}

std::vector<std::string> Endpoint::transports() const {
  constexpr unsigned kMost = 64;
  ucp::TransportEntry entries[kMost]{};
  ucp::EpAttr attr{};
  attr.field_mask = ucp::kEpAttrTransports;
  attr.transports = {entries, kMost, sizeof entries[0]};
  std::vector<std::string> names;
  auto* self = const_cast<Endpoint*>(this);
  if (rail_->forked() || self->enter() != 0) return names;
  if (ucp::library().ep_query(handle(), &attr) == ucp::kOk)
    for (unsigned i = 0; i < attr.transports.num_entries; ++i)
      names.push_back(std::string(entries[i].transport) + "/" + entries[i].device);
  self->leave();
  return names;
}

RemoteKey::RemoteKey(std::shared_ptr<Endpoint> endpoint, const std::string& packed, uint64_t address, uint64_t nbytes)
    : endpoint_(std::move(endpoint)), address_(address), nbytes_(nbytes) {
  if (!endpoint_->rail()->usable() || endpoint_->enter() != 0) throw std::runtime_error("the endpoint is closed");
  auto status = ucp::library().ep_rkey_unpack(endpoint_->handle(), packed.data(), &rkey_);
  endpoint_->leave();
  if (status != ucp::kOk) fail_with("UCX does not take the peer's key", status);
}

void RemoteKey::destroy() {
  ucp::Rkey rkey = std::exchange(rkey_, nullptr);
  if (rkey != nullptr && endpoint_->rail()->alive()) ucp::library().rkey_destroy(rkey);
}

}  // namespace raynixl
