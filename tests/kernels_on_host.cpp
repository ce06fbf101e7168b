// The kernels of nvlink_kernels.cu as ordinary code of the host. Compiled by tests/backends/test_nvlink_kernels.py, with
// KERNELS as the path of the source.
#include "kernels_on_host.h"

#define asm(...) wide = host::widened(value.bits)  // the only one there is: cvt.f32.f16
#include KERNELS
#undef asm

template <class... Types, size_t... k>
static void call(void (*kernel)(Types...), const u64* values, std::index_sequence<k...>) {
  kernel((Types)(values[k])...);
}

// Returns whether a kernel of that name is known here.
extern "C" int run_kernel(const char* name, unsigned grid, unsigned threads, const u64* values) {
  auto run = [&](auto kernel, auto numbers) {
    return host::run([=] { call(kernel, values, numbers); }, grid, threads);
  };
  auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("raynixl_copy_small")) return run(raynixl_copy_small, std::make_index_sequence<6>());
  if (is("raynixl_copy_range")) return run(raynixl_copy_range, std::make_index_sequence<7>());
  if (is("raynixl_copy_tiles")) return run(raynixl_copy_tiles, std::make_index_sequence<5>());
  if (is("raynixl_copy_narrow")) return run(raynixl_copy_narrow, std::make_index_sequence<5>());
  if (is("raynixl_signal")) return run(raynixl_signal, std::make_index_sequence<3>());
  if (is("raynixl_digest")) return run(raynixl_digest, std::make_index_sequence<12>());
  if (is("raynixl_quantise_float32")) return run(raynixl_quantise_float32, std::make_index_sequence<5>());
  if (is("raynixl_quantise_bfloat16")) return run(raynixl_quantise_bfloat16, std::make_index_sequence<5>());
  if (is("raynixl_quantise_float16")) return run(raynixl_quantise_float16, std::make_index_sequence<5>());
  return 0;
}
