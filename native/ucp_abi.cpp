#include "ucp_abi.h"

#include <stdexcept>
#include <string>

#include <dlfcn.h>

namespace raynixl::ucp {

namespace {

template <typename Function>
void find(void* handle, const char* name, Function& function) {
  void* found = dlsym(handle, name);
  if (found == nullptr) throw std::runtime_error(std::string("this UCX has no ") + name + ": it is older than 1.13");
  function = reinterpret_cast<Function>(found);
}

Library load() {
  // ucxx has loaded it, from wherever the user's UCX is: asking for it by its name gives that one.
  void* ucp = dlopen("libucp.so.0", RTLD_NOW | RTLD_NOLOAD);
  if (ucp == nullptr) throw std::runtime_error("libucp.so.0 is not loaded");
  Library l{};
  find(ucp, "ucp_worker_get_address", l.worker_get_address);
  find(ucp, "ucp_worker_release_address", l.worker_release_address);
  find(ucp, "ucp_worker_progress", l.worker_progress);
  find(ucp, "ucp_worker_signal", l.worker_signal);
  find(ucp, "ucp_worker_arm", l.worker_arm);
  find(ucp, "ucp_worker_get_efd", l.worker_get_efd);
  find(ucp, "ucp_mem_map", l.mem_map);
  find(ucp, "ucp_mem_unmap", l.mem_unmap);
  find(ucp, "ucp_rkey_pack", l.rkey_pack);
  find(ucp, "ucp_rkey_buffer_release", l.rkey_buffer_release);
  find(ucp, "ucp_ep_rkey_unpack", l.ep_rkey_unpack);
  find(ucp, "ucp_rkey_destroy", l.rkey_destroy);
  find(ucp, "ucp_ep_create", l.ep_create);
  find(ucp, "ucp_ep_close_nbx", l.ep_close_nbx);
  find(ucp, "ucp_ep_query", l.ep_query);
  find(ucp, "ucp_ep_flush_nbx", l.ep_flush_nbx);
  find(ucp, "ucp_put_nbx", l.put_nbx);
  find(ucp, "ucp_get_nbx", l.get_nbx);
  find(ucp, "ucp_request_free", l.request_free);
  find(ucp, "ucs_status_string", l.status_string);  // libucs, on which libucp depends
  return l;
}

}  // namespace

const Library& library() {
  static const Library found = load();
  return found;
}

}  // namespace raynixl::ucp
