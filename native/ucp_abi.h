// The part of UCX's C interface that the core uses, declared by ourselves: the core is built without UCX and finds the
// library at run time, whichever the user has. UCX keeps this interface stable from 1.11 on: structures grow at their
// end, and a mask says which fields are set. tests/native/test_ucp_abi.py compares it with the headers of libucx.
// https://openucx.readthedocs.io/en/master/api.html
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/socket.h>

namespace raynixl::ucp {

using Status = int8_t;  // ucs_status_t: 0 well, negative an error

enum : Status { kOk = 0, kNoMemory = -4, kInvalidAddress = -7, kBusy = -15, kUnsupported = -22 };

using Context = void*;
using Worker = void*;
using Ep = void*;
using Memh = void*;
using Rkey = void*;

// What a non-blocking call returns: null when done, a request, or an error as a small negative pointer.
using StatusPtr = void*;
inline bool is_error(StatusPtr p) { return reinterpret_cast<uintptr_t>(p) >= uintptr_t(-100); }
inline Status error_of(StatusPtr p) { return Status(reinterpret_cast<intptr_t>(p)); }

using SendCallback = void (*)(void* request, Status status, void* user_data);
using ErrorCallback = void (*)(void* arg, Ep ep, Status status);

enum MemoryType : int { kHost = 0, kCuda = 1 };

struct RequestParam {
  uint32_t op_attr_mask;
  uint32_t flags;
  void* request;
  SendCallback send;
  uint64_t datatype;
  void* user_data;
  void* reply_buffer;
  int memory_type;
  void* recv_info;
  Memh memh;
};
constexpr uint32_t kFieldCallback = 1u << 1;
constexpr uint32_t kFieldUserData = 1u << 2;
constexpr uint32_t kFieldFlags = 1u << 4;
constexpr uint32_t kFieldMemoryType = 1u << 6;
constexpr uint32_t kFieldMemh = 1u << 8;
constexpr uint32_t kMultiSend = 1u << 19;
constexpr uint32_t kCloseForce = 1u << 0;

struct MemMapParams {
  uint64_t field_mask;
  void* address;
  size_t length;
  unsigned flags;
  unsigned prot;
  int memory_type;
  const void* exported_memh_buffer;
};
constexpr uint64_t kMapAddress = 1u << 0;
constexpr uint64_t kMapLength = 1u << 1;
constexpr uint64_t kMapMemoryType = 1u << 4;

struct SockAddr {
  const sockaddr* addr;
  socklen_t addrlen;
};

struct EpParams {
  uint64_t field_mask;
  const void* address;
  int err_mode;
  ErrorCallback err_callback;
  void* err_arg;
  void* user_data;
  unsigned flags;
  SockAddr sockaddr;
  void* conn_request;
  const char* name;
  SockAddr local_sockaddr;
};
constexpr uint64_t kEpAddress = 1u << 0;
constexpr uint64_t kEpErrMode = 1u << 1;
constexpr uint64_t kEpErrHandler = 1u << 2;
constexpr int kErrModePeer = 1;

struct TransportEntry {
  const char* transport;
  const char* device;
};
struct Transports {
  TransportEntry* entries;
  unsigned num_entries;
  size_t entry_size;
};
struct EpAttr {
  uint64_t field_mask;
  char name[32];
  sockaddr_storage local_sockaddr;
  sockaddr_storage remote_sockaddr;
  Transports transports;
  void* user_data;
};
constexpr uint64_t kEpAttrTransports = 1u << 3;

// The functions, as found in the library that is loaded.
struct Library {
  Status (*worker_get_address)(Worker, void**, size_t*);
  void (*worker_release_address)(Worker, void*);
  unsigned (*worker_progress)(Worker);
  Status (*worker_signal)(Worker);
  Status (*worker_arm)(Worker);
  Status (*worker_get_efd)(Worker, int*);
  Status (*mem_map)(Context, const MemMapParams*, Memh*);
  Status (*mem_unmap)(Context, Memh);
  Status (*rkey_pack)(Context, Memh, void**, size_t*);
  void (*rkey_buffer_release)(void*);
  Status (*ep_rkey_unpack)(Ep, const void*, Rkey*);
  void (*rkey_destroy)(Rkey);
  Status (*ep_create)(Worker, const EpParams*, Ep*);
  StatusPtr (*ep_close_nbx)(Ep, const RequestParam*);
  Status (*ep_query)(Ep, EpAttr*);
  StatusPtr (*ep_flush_nbx)(Ep, const RequestParam*);
  StatusPtr (*put_nbx)(Ep, const void*, size_t, uint64_t, Rkey, const RequestParam*);
  StatusPtr (*get_nbx)(Ep, void*, size_t, uint64_t, Rkey, const RequestParam*);
  void (*request_free)(void*);
  const char* (*status_string)(Status);
};

// The library's functions; found once. Throws std::runtime_error that names what is missing.
const Library& library();

}  // namespace raynixl::ucp
