// Python's view of the core. raynixl/native/__init__.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <optional>
#include <system_error>
#include <vector>

#include "engine.h"
#include "python.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

constexpr double kExitTimeout = 2.0;

// Keeps an engine open as long as Python holds it, a program or a job of it.
struct Owner {
  std::shared_ptr<Engine> engine;
  uint64_t inline_nbytes;

  Owner(int threads, uint64_t inline_limit) : engine(std::make_shared<Engine>(threads)), inline_nbytes(inline_limit) {}
  Owner(const Owner&) = delete;
  ~Owner() {
    nb::gil_scoped_release release;
    engine->close(deadline_after(kExitTimeout));
  }
};

struct PyEngine {
  std::shared_ptr<Owner> owner;
};

struct PyProgram {
  std::shared_ptr<Owner> owner;
  std::shared_ptr<const Plan> plan;
};

struct PyJob {
  std::shared_ptr<Owner> owner;
  std::shared_ptr<Job> job;
};

using Segments = nb::ndarray<const uint64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

// Engines that are still open when the interpreter goes: their threads must not touch memory that it frees.
std::vector<std::weak_ptr<Engine>>& open_engines() {
  static auto* engines = new std::vector<std::weak_ptr<Engine>>();
  return *engines;
}

void close_engines() {
  nb::gil_scoped_release release;
  for (auto& weak : open_engines())
    if (auto engine = weak.lock()) engine->close(deadline_after(kExitTimeout));
}

void watch(const std::shared_ptr<Engine>& engine) {
  auto& engines = open_engines();
  static const bool registered = [] {
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(close_engines));
    return true;
  }();
  (void)registered;
  std::erase_if(engines, [](const auto& weak) { return weak.expired(); });
  engines.push_back(engine);
}

void gate_close(PyGate& self, int code, bool abort) {
  if (code < 2 || code >= 1 << 29) throw nb::value_error("the code of a closed gate is 2 or more");
  self.gate->close(code, abort);
}

bool gate_drain(PyGate& self, double timeout) {
  int64_t deadline = deadline_after(timeout);
  std::shared_ptr<Gate> gate = self.gate;
  for (;;) {
    if (gate->inflight() == 0) return true;
    Gate::Drained drained;
    {
      nb::gil_scoped_release release;
      drained = gate->drain(deadline);
    }
    if (drained != Gate::Drained::interrupted) return drained == Gate::Drained::yes;
    check_signals();
  }
}

void engine_init(PyEngine* self, int threads, int64_t inline_nbytes) {
  if (threads < 1) throw nb::value_error("an engine needs at least one thread");
  if (inline_nbytes < 0) throw nb::value_error("inline_nbytes is negative");
  new (self) PyEngine{std::make_shared<Owner>(threads, uint64_t(inline_nbytes))};
  watch(self->owner->engine);
}

PyProgram engine_program(PyEngine& self, int mode, int pid, const Segments& segments, nb::sequence gates) {
  if (mode < 0 || mode > 2) throw nb::value_error("unknown mode");
  static_assert(sizeof(Segment) == 3 * sizeof(uint64_t));
  auto* first = reinterpret_cast<const Segment*>(segments.data());
  std::vector<Segment> copied(first, first + segments.shape(0));
  std::vector<std::shared_ptr<Gate>> doors;
  for (nb::handle gate : gates) doors.push_back(nb::cast<PyGate&>(gate, false).gate);
  return {self.owner, std::make_shared<const Plan>(Mode(mode), pid, std::move(copied), std::move(doors))};
}

bool engine_close(PyEngine& self, double timeout) {
  std::shared_ptr<Owner> owner = self.owner;
  nb::gil_scoped_release release;
  return owner->engine->close(deadline_after(timeout));
}

int copy_here(const Plan& plan, double timeout) {
  if (plan.pieces() == 1) return plan.copy(0);
  int64_t deadline = deadline_after(timeout);
  for (size_t piece = 0; piece < plan.pieces(); ++piece) {
    if (piece > 0 && now_ns() >= deadline) return TIMEOUT;
    if (int code = piece > 0 ? plan.closed() : 0) return code;
    if (int error = plan.copy(piece)) return error;
  }
  return DONE;
}

int run_here(const PyProgram& self, double timeout) {
  int code;
  if (self.plan->nbytes() <= kKeepGil) {
    code = copy_here(*self.plan, timeout);
  } else {
    nb::gil_scoped_release release;
    code = copy_here(*self.plan, timeout);
  }
  self.plan->leave();
  return code;
}

nb::object program_run(const PyProgram& self, double timeout, bool out_of_line) {
  const Owner& owner = *self.owner;
  if (!owner.engine->usable()) return nb::int_(int(CLOSED));
  if (int code = self.plan->enter()) return nb::int_(code);
  if (self.plan->nbytes() <= owner.inline_nbytes && !out_of_line) return nb::int_(run_here(self, timeout));
  std::shared_ptr<Job> job = owner.engine->post(self.plan, deadline_after(timeout));
  if (!job) return nb::int_(int(CLOSED));
  return nb::cast(PyJob{self.owner, std::move(job)});
}

nb::object program_run_digesting(const PyProgram& self, double timeout, uint64_t shift, uint64_t seed) {
  const Owner& owner = *self.owner;
  if (!owner.engine->usable()) return nb::int_(int(CLOSED));
  if (int code = self.plan->enter()) return nb::int_(code);
  std::optional<Plan::Digest> digest;
  if (self.plan->can_digest()) digest = Plan::Digest{shift, seed};
  std::shared_ptr<Job> job = owner.engine->post(self.plan, deadline_after(timeout), digest);
  if (!job) return nb::int_(int(CLOSED));
  return nb::cast(PyJob{self.owner, std::move(job)});
}

nb::object job_digest(PyJob& self) {
  std::optional<DigestSum> digest = self.job->digest();
  if (!digest) return nb::none();
  return nb::make_tuple(digest->lanes[0], digest->lanes[1]);
}

bool job_wait(PyJob& self, double timeout) {
  std::shared_ptr<Job> job = self.job;
  if (job->code() != PENDING) return true;
  if (!(timeout > 0)) return false;
  return wait_for<Job>(timeout, [&](int64_t deadline) { return job->wait(deadline); });
}

bool job_wait_settled(PyJob& self, double timeout) {
  std::shared_ptr<Job> job = self.job;
  return wait_for<Job>(timeout, [&](int64_t deadline) { return job->wait_settled(deadline); });
}

bool job_cancel(PyJob& self, int code) {
  if (code < 2) throw nb::value_error("the code of a cancelled job is 2 or more");
  return self.job->end(code);
}

void copy_range(uint64_t destination, uint64_t source, uint64_t nbytes) {
  nb::gil_scoped_release release;
  auto* to = reinterpret_cast<void*>(destination);
  auto* from = reinterpret_cast<const void*>(source);
  if (nbytes <= kStreamAbove) return copy_block(to, from, nbytes);
  stream_block(to, from, nbytes);
  stream_fence();
}

void bind_gate(nb::module_& m) {
  nb::class_<PyGate>(m, "Gate")
      .def(nb::init<>())
      .def("close", gate_close, "code"_a, nb::kw_only(), "abort"_a = true)
      .def("drain", gate_drain, "timeout"_a)
      .def("enter", [](PyGate& self) { return self.gate->enter(); })
      .def("leave", [](PyGate& self) { self.gate->leave(); })
      .def_prop_ro("aborted", [](PyGate& self) { return self.gate->aborted(); })
      .def_prop_ro("code", [](PyGate& self) { return self.gate->code(); })
      .def_prop_ro("inflight", [](PyGate& self) { return self.gate->inflight(); });
}

void bind_engine(nb::module_& m) {
  nb::class_<PyEngine>(m, "Engine")
      .def("__init__", engine_init, "threads"_a, "inline_nbytes"_a = 1 << 20)
      .def("program", engine_program, "mode"_a, "pid"_a, nb::arg("segments").noconvert(), "gates"_a)
      .def("close", engine_close, "timeout"_a)
      .def_prop_ro("threads", [](PyEngine& self) { return self.owner->engine->threads(); });
  nb::class_<PyProgram>(m, "Program")
      .def("run", program_run, "timeout"_a, "out_of_line"_a = false)
      .def("run_digesting", program_run_digesting, "timeout"_a, "shift"_a, "seed"_a)
      .def_prop_ro("nbytes", [](PyProgram& self) { return self.plan->nbytes(); })
      .def_prop_ro("count", [](PyProgram& self) { return self.plan->count(); });
}

void bind_job(nb::module_& m) {
  nb::class_<PyJob>(m, "Job")
      .def("wait", job_wait, "timeout"_a)
      .def("wait_settled", job_wait_settled, "timeout"_a)
      .def("cancel", job_cancel, "code"_a)
      .def("arm", [](PyJob& self, int fd) { return arm(*self.job, fd); }, "fd"_a)
      .def_prop_ro("code", [](PyJob& self) { return self.job->code(); })
      .def_prop_ro("nbytes_done", [](PyJob& self) { return self.job->nbytes_done(); })
      .def_prop_ro("digest", job_digest)
      .def_prop_ro("settled", [](PyJob& self) { return self.job->settled(); });
}

}  // namespace

}  // namespace raynixl

NB_MODULE(_native, m) {
  nanobind::set_leak_warnings(false);  // an agent that nobody closed is reported by its own finalizer, in words
  m.attr("NAME") = "native";
  raynixl::bind_gate(m);
  raynixl::bind_engine(m);
  raynixl::bind_job(m);
  raynixl::bind_ucx(m);
  raynixl::bind_weights(m);
  raynixl::bind_cuda(m);
  raynixl::bind_moe(m);
  m.def("copy", raynixl::copy_range, "dst_addr"_a, "src_addr"_a, "nbytes"_a);
  m.def("mapped", raynixl::is_mapped, "address"_a, "nbytes"_a);
}
