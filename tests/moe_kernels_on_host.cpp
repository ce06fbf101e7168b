// The kernels of raynixl/moe/kernels as ordinary code of the host. Compiled by tests/moe_kernels_host.py, with KERNELS as
// the path of all their sources put together.
#include "kernels_on_host.h"

namespace {

unsigned long long load_acquire(const unsigned long long* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
void store_release(unsigned long long* to, unsigned long long value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }
unsigned long long nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}
float widen_half(unsigned short bits) { return host::widened(bits); }
unsigned short narrow_half(float value) { return host::bits_of<unsigned short>(_Float16(value)); }

}  // namespace

#include KERNELS

// Run a kernel, so many CTAs at a time. Returns whether one of that name is known here. Any number of threads may call it.
extern "C" int raynixl_moe_host_wide(const char* name, unsigned grid, unsigned threads, unsigned at_once,
                                     const void* arguments) {
  auto run = [&]<class Arguments>(void (*kernel)(const Arguments)) {
    Arguments copy;
    std::memcpy(&copy, arguments, sizeof copy);
    return host::run([=] { kernel(copy); }, grid, threads, at_once);
  };
  auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("raynixl_moe_send")) return run(raynixl_moe_send);
  if (is("raynixl_moe_arrive")) return run(raynixl_moe_arrive);
  if (is("raynixl_moe_order")) return run(raynixl_moe_order);
  if (is("raynixl_moe_take")) return run(raynixl_moe_take);
  if (is("raynixl_moe_give")) return run(raynixl_moe_give);
  if (is("raynixl_moe_sum")) return run(raynixl_moe_sum);
  if (is("raynixl_moe_mask")) return run(raynixl_moe_mask);
  return 0;
}

// Likewise, one CTA after the other.
extern "C" int raynixl_moe_host(const char* name, unsigned grid, unsigned threads, const void* arguments) {
  return raynixl_moe_host_wide(name, grid, threads, 1, arguments);
}
