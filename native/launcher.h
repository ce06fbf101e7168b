// Launcher: a kernel of a GPU, packed once and started many times, with copies before it if there are any.
#pragma once

#include <cstdint>

#include <vector>

#include "cuda.h"

namespace raynixl {

// Functions of the driver, by address: cuCtxGetCurrent, cuCtxPushCurrent, cuCtxPopCurrent, cuLaunchKernel, cuMemcpyAsync.
struct CudaCalls {
  int (*get_current)(void**);
  int (*push)(void*);
  int (*pop)(void**);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  CudaCopy copy;
};

class Launcher {
 public:
  // `arguments` are all numbers of 64 bits; `rows` of (from, to, bytes) are copied by the driver first.
  Launcher(const CudaCalls& calls, void* context, void* function, unsigned grid, unsigned threads,
           std::vector<uint64_t> arguments, std::vector<uint64_t> rows)
      : calls_(calls),
        context_(context),
        function_(function),
        grid_(grid),
        threads_(threads),
        arguments_(std::move(arguments)),
        rows_(std::move(rows)) {}

  // Put it on a stream, in its context, with these numbers as its last arguments. Returns the driver's first error, or
  // 0. Any thread may, at any time.
  int run(void* stream, const uint64_t (&end)[3]) const;

 private:
  int start(void* stream, const uint64_t (&end)[3]) const;

  const CudaCalls calls_;
  void* const context_;
  void* const function_;
  const unsigned grid_, threads_;
  const std::vector<uint64_t> arguments_;
  const std::vector<uint64_t> rows_;
};

}  // namespace raynixl
