// Python's view of what the core does with CUDA. raynixl/native/__init__.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>

#include "cuda.h"
#include "launcher.h"
#include "python.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

using Rows = nb::ndarray<const uint64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename Function>
void take(Function& function, uint64_t address) {
  function = reinterpret_cast<Function>(address);
}

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

void enter_cuda_by_address(uint64_t context, uint64_t get_current, uint64_t set_current) {
  CudaContext entered{pointer(context), nullptr, nullptr};
  take(entered.get_current, get_current), take(entered.set_current, set_current);
  enter_cuda(entered);
}

int cuda_copy_loop(uint64_t copy, uint64_t stream, Rows rows) {
  nb::gil_scoped_release release;
  return copy_one_by_one(reinterpret_cast<CudaCopy>(copy), rows.data(), rows.shape(0), pointer(stream));
}

// Without the lock: what writes the word may be a GPU, whose work other threads of Python still have to hand out.
bool look_for(uint64_t address, uint64_t value, double timeout) {
  auto* word = reinterpret_cast<std::atomic<uint64_t>*>(address);
  if (word->load(std::memory_order_acquire) >= value) return true;
  int64_t deadline = deadline_after(timeout);
  nb::gil_scoped_release release;
  do {
    for (int k = 0; k < 16; ++k) {
      if (word->load(std::memory_order_acquire) >= value) return true;
      relax();
    }
  } while (now_ns() < deadline);
  return word->load(std::memory_order_acquire) >= value;
}

void launcher_init(Launcher* self, nb::tuple functions, uint64_t context, uint64_t function, nb::tuple shape,
                   const Numbers& values, const Rows& copies) {
  if (nb::len(functions) != 5 || nb::len(shape) != 2) throw nb::value_error("five functions, and grid and threads");
  CudaCalls calls;
  take(calls.get_current, nb::cast<uint64_t>(functions[0])), take(calls.push, nb::cast<uint64_t>(functions[1]));
  take(calls.pop, nb::cast<uint64_t>(functions[2])), take(calls.launch, nb::cast<uint64_t>(functions[3]));
  take(calls.copy, nb::cast<uint64_t>(functions[4]));
  new (self) Launcher(calls, pointer(context), pointer(function), nb::cast<unsigned>(shape[0]),
                      nb::cast<unsigned>(shape[1]), {values.data(), values.data() + values.size()},
                      {copies.data(), copies.data() + copies.size()});
}

// Starting a kernel takes less than handing the lock over, unless the stream is full and the driver waits.
int launcher_run(const Launcher& self, uint64_t stream, uint64_t flag, uint64_t number, uint64_t counter,
                 bool may_wait) {
  const uint64_t end[3] = {flag, number, counter};
  if (!may_wait) return self.run(pointer(stream), end);
  nb::gil_scoped_release release;
  return self.run(pointer(stream), end);
}

}  // namespace

void bind_cuda(nb::module_& m) {
  nb::class_<Launcher>(m, "Launcher")
      .def("__init__", launcher_init, "functions"_a, "context"_a, "function"_a, "shape"_a,
           nb::arg("values").noconvert(), nb::arg("copies").noconvert())
      .def("run", launcher_run, "stream"_a, "flag"_a, "number"_a, "counter"_a, "may_wait"_a);
  m.def("enter_cuda", enter_cuda_by_address, "context"_a, "get_current"_a, "set_current"_a);
  m.def("look_for", look_for, "address"_a, "value"_a, "timeout"_a);
  m.def("cuda_copy_loop", cuda_copy_loop, "copy"_a, "stream"_a, nb::arg("rows").noconvert());
}

}  // namespace raynixl
