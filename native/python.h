// What the files that show the core to Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <system_error>

#include "clock.h"
#include "gate.h"

namespace raynixl {

constexpr uint64_t kKeepGil = 16 << 10;  // releasing and taking the lock costs as much as copying this

struct PyGate {
  std::shared_ptr<Gate> gate = std::make_shared<Gate>();
};

inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
}

// Wait without the lock, coming back now and then for Python's signals.
template <typename Job, typename Wait>
bool wait_for(double timeout, Wait wait) {
  int64_t deadline = deadline_after(timeout);
  for (;;) {
    typename Job::Waited waited;
    {
      nanobind::gil_scoped_release release;
      waited = wait(deadline);
    }
    if (waited != Job::Waited::look_up) return waited == Job::Waited::ended;
    check_signals();
  }
}

template <typename Job>
bool arm(Job& job, int fd) {
  try {
    return job.arm(fd);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nanobind::python_error();
  }
}

void bind_cuda(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_ucx(nanobind::module_& m);
void bind_weights(nanobind::module_& m);

}  // namespace raynixl
