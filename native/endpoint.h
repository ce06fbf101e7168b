// Endpoint: one UCX endpoint to one peer, with error handling always; and the keys of the peer's memory on it.
#pragma once

#include <cstdint>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "clock.h"
#include "rail.h"

namespace raynixl {

class Endpoint : public std::enable_shared_from_this<Endpoint> {
 public:
  static std::shared_ptr<Endpoint> create(std::shared_ptr<Rail> rail, const std::string& address);
  explicit Endpoint(std::shared_ptr<Rail> rail) : rail_(std::move(rail)) {}
  Endpoint(const Endpoint&) = delete;

  // Operations are posted between these two; `enter` returns the code of a closed endpoint, else 0.
  int enter() {
    uint32_t before = posters_.fetch_add(1, std::memory_order_acq_rel);
    if (!(before & kClosed)) return 0;
    leave();
    return code();
  }
  void leave() {
    if (posters_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) close_handle();
  }
  bool is_refused() const { return posters_.load(std::memory_order_acquire) & kClosed; }

  // Refuse later operations with `code`, and end those in flight by force. Does not wait. The first code stays.
  void close(int code);
  // UCX reports that the peer, or the way to it, is gone. The owner hears of it and closes.
  void failed(ucp::Status status);

  // Let one read be under way at a time, of so many bytes at most; 0 for any number. Where UCX emulates reads, the
  // target answers with messages. If the reader dies, UCX 1.19 to 1.21 crash the target over those that wait for room
  // in its socket's buffer (uct_tcp_ep_pending_purge takes them for requests of the user's), and over a second read
  // that it finds behind the one whose answer has failed (ucp_request_try_send takes no error).
  void limit_reads(uint64_t nbytes) { read_limit_.store(nbytes); }
  uint64_t read_limit() const { return read_limit_.load(std::memory_order_relaxed); }

  // Begin a read; false if one is under way: `job` is pumped once it has ended.
  bool acquire(const std::shared_ptr<RmaJob>& job);
  void give_back();

  int code() const { return code_.load(std::memory_order_acquire); }
  // What UCX said first, or kOk.
  ucp::Status status() const { return status_.load(std::memory_order_acquire); }
  bool is_gone() const { return gone_.load(std::memory_order_acquire); }

  std::vector<std::string> transports() const;
  ucp::Ep handle() const { return ep_.load(std::memory_order_relaxed); }
  const std::shared_ptr<Rail>& rail() const { return rail_; }

 private:
  static constexpr uint32_t kClosed = 1u << 31;
  static void on_error(void* self, ucp::Ep, ucp::Status status);
  static void on_closed(void* request, ucp::Status, void* self);
  void close_handle();

  const std::shared_ptr<Rail> rail_;
  std::atomic<ucp::Ep> ep_{nullptr};  // taken out by the one who closes it
  std::atomic<uint32_t> posters_{0};
  std::atomic<int> code_{0};
  std::atomic<ucp::Status> status_{ucp::kOk};
  std::atomic<bool> gone_{false};
  std::atomic<uint64_t> read_limit_{0};
  std::mutex reads_lock_;  // protects is_reading_ and waiting_
  bool is_reading_ = false;
  std::vector<std::shared_ptr<RmaJob>> waiting_;
  std::shared_ptr<Endpoint> self_;  // UCX holds our address until the endpoint is gone
};

// A span of a peer's memory, reachable over one endpoint.
class RemoteKey {
 public:
  RemoteKey(std::shared_ptr<Endpoint> endpoint, const std::string& packed, uint64_t address, uint64_t nbytes);
  RemoteKey(const RemoteKey&) = delete;
  ~RemoteKey() { destroy(); }
  void destroy();
  bool holds(uint64_t address, uint64_t nbytes) const {
    return address >= address_ && nbytes <= nbytes_ && address - address_ <= nbytes_ - nbytes;
  }
  ucp::Rkey handle() const { return rkey_; }
  const std::shared_ptr<Endpoint>& endpoint() const { return endpoint_; }

 private:
  const std::shared_ptr<Endpoint> endpoint_;
  const uint64_t address_, nbytes_;
  ucp::Rkey rkey_ = nullptr;
};

}  // namespace raynixl
