// Python's view of the UCX part of the core. raynixl/native/ucx.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "endpoint.h"
#include "python.h"
#include "rail.h"
#include "rma.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

constexpr size_t kFewRows = 4;            // what is posted and, if UCX is quick, completed with the lock held
constexpr int kFewLooks = 16;             // how often UCX is then asked before the lock is released
constexpr int64_t kPatience = 50'000;     // how long a post stays with a transfer of which nothing is heard, in ns
constexpr double kExitTimeout = 2.0;
constexpr int64_t kStay = 10'000'000;     // and how long in all,
constexpr int64_t kShortStay = 100'000;    // or beside others

struct PyRail {
  std::shared_ptr<Rail> rail;
};
struct PyMapping {
  std::shared_ptr<Mapping> mapping;
};
struct PyEndpoint {
  std::shared_ptr<Endpoint> endpoint;
};
struct PyRemoteKey {
  std::shared_ptr<RemoteKey> key;
};
struct PyRma {
  std::shared_ptr<const RmaPlan> plan;
  uint64_t inline_nbytes;
};
struct PyRmaJob {
  std::shared_ptr<RmaJob> job;
};

std::string to_string(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }
nb::bytes to_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }

// UCX's lock may be held for long by one who copies: nobody waits for it with the interpreter's.
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <typename Call>
auto unlocked(Call call) {
  nb::gil_scoped_release release;
  return call();
}

// Rails that are still open when the interpreter goes: their threads must not touch what it and UCX then free.
std::vector<std::weak_ptr<Rail>>& open_rails() {
  static auto* rails = new std::vector<std::weak_ptr<Rail>>();
  return *rails;
}

void close_rails() {
  nb::gil_scoped_release release;
  for (auto& weak : open_rails()) {
    auto rail = weak.lock();
    if (!rail) continue;
    rail->close(deadline_after(kExitTimeout));
    rail->release();
  }
}

void rail_init(PyRail* self, uint64_t context, uint64_t worker, int bell) {
  new (self) PyRail{std::make_shared<Rail>(reinterpret_cast<void*>(context), reinterpret_cast<void*>(worker), bell)};
  auto& rails = open_rails();
  static const bool registered = [] {
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(close_rails));
    return true;
  }();
  (void)registered;
  std::erase_if(rails, [](const auto& weak) { return weak.expired(); });
  rails.push_back(self->rail);
}

PyMapping rail_map(PyRail& self, uint64_t address, uint64_t nbytes, int memory_type) {
  nb::gil_scoped_release release;
  return {std::make_shared<Mapping>(self.rail, address, nbytes, memory_type)};
}

PyEndpoint rail_connect(PyRail& self, const nb::bytes& address) {
  std::string copied = to_string(address);
  nb::gil_scoped_release release;
  return {self.rail->connect(copied)};
}

bool rail_sweep(PyRail& self, double grace) {
  nb::gil_scoped_release release;
  return self.rail->sweep(int64_t(grace * 1e9));
}

bool rail_close(PyRail& self, double timeout) {
  nb::gil_scoped_release release;
  return self.rail->close(deadline_after(timeout));
}

PyRemoteKey endpoint_unpack(PyEndpoint& self, const nb::bytes& key, uint64_t address, uint64_t nbytes) {
  std::string copied = to_string(key);
  nb::gil_scoped_release release;
  return {std::make_shared<RemoteKey>(self.endpoint, copied, address, nbytes)};
}

std::string endpoint_status(PyEndpoint& self) {
  ucp::Status status = self.endpoint->status();
  return status == ucp::kOk ? "" : ucp::library().status_string(status);
}

using Rows = nb::ndarray<const uint64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;

RmaPath to_path(nb::handle path) {
  if (!nb::isinstance<nb::tuple>(path) || nb::len(path) != 2 || !nb::isinstance<PyMapping>(path[0]) ||
      !nb::isinstance<PyRemoteKey>(path[1]))
    throw nb::type_error("a path is a mapping and a remote key of this core");
  return {nb::cast<PyMapping&>(path[0], false).mapping, nb::cast<PyRemoteKey&>(path[1], false).key};
}

std::shared_ptr<Gate> to_gate(nb::handle gate) {
  if (!nb::isinstance<PyGate>(gate)) throw nb::type_error("gates must be gates of this core");
  return nb::cast<PyGate&>(gate, false).gate;
}

PyRma make_rma(bool is_write, nb::sequence paths, const Rows& rows, nb::sequence gates, uint64_t inline_nbytes) {
  static_assert(sizeof(RmaRow) == 4 * sizeof(uint64_t));
  std::vector<RmaPath> ways;
  for (nb::handle path : paths) ways.push_back(to_path(path));
  auto* first = reinterpret_cast<const RmaRow*>(rows.data());
  std::vector<RmaRow> copied(first, first + rows.shape(0));
  std::vector<std::shared_ptr<Gate>> doors;
  for (nb::handle gate : gates) doors.push_back(to_gate(gate));
  auto plan = std::make_shared<const RmaPlan>(is_write, std::move(ways), std::move(copied), std::move(doors));
  return {std::move(plan), inline_nbytes};
}

// Post, unless that was done with the lock held, and stay with a small transfer for as long as it moves.
void carry(RmaJob& job, bool is_inline, bool is_posted, int64_t stay) {
  if (!is_posted && is_inline && stay == kStay && job.plan().rows().size() <= kFewRows && !job.plan().is_limited())
    job.run_few(kFewLooks);
  else if (!is_posted)
    job.pump();
  if (!is_inline || !job.progress(kPatience, now_ns() + stay)) job.hand_over();
}

nb::object rma_run(const PyRma& self, double timeout, bool out_of_line) {
  const RmaPlan& plan = *self.plan;
  Rail& rail = *plan.rails().front();
  Rail::Use use(rail);
  if (!plan.usable()) return nb::int_(int(CLOSED));
  if (plan.is_refused()) return nb::int_(int(LOST));
  if (int code = plan.enter()) return nb::int_(code);
  auto job = std::make_shared<RmaJob>(self.plan, deadline_after(timeout));
  // Beside others a small operation would progress theirs, which may be large: it stays for a moment only.
  bool is_quiet = rail.is_quiet(2);
  bool is_inline = plan.nbytes() <= self.inline_nbytes && !out_of_line;
  bool keeps_lock = is_inline && is_quiet && plan.nbytes() <= kKeepGil && plan.rows().size() <= kFewRows && !plan.is_limited();
  if (keeps_lock && job->run_few(kFewLooks)) return nb::int_(job->code());
  {
    nb::gil_scoped_release release;
    carry(*job, is_inline, keeps_lock, is_quiet ? kStay : kShortStay);
  }
  // UCX's thread may be about to say with what it ends: then it is a job like others.
  if (!out_of_line && job->has_settled()) return nb::int_(job->code());
  return nb::cast(PyRmaJob{std::move(job)});
}

bool rma_job_wait(PyRmaJob& self, double timeout) {
  std::shared_ptr<RmaJob> job = self.job;
  if (job->code() != PENDING) return true;
  if (!(timeout > 0)) return false;
  return wait_for<RmaJob>(timeout, [&](int64_t deadline) { return job->wait(deadline); });
}

bool rma_job_wait_settled(PyRmaJob& self, double timeout) {
  std::shared_ptr<RmaJob> job = self.job;
  return wait_for<RmaJob>(timeout, [&](int64_t deadline) { return job->wait_settled(deadline); });
}

bool rma_job_cancel(PyRmaJob& self, int code) {
  if (code < 2) throw nb::value_error("the code of a cancelled job is 2 or more");
  nb::gil_scoped_release release;
  return self.job->end(code);
}

void bind_rail(nb::module_& m) {
  nb::class_<PyRail>(m, "Rail")
      .def("__init__", rail_init, "context"_a, "worker"_a, "bell"_a)
      .def_prop_ro("address", [](PyRail& self) { return to_bytes(unlocked([&] { return self.rail->address(); })); })
      .def("map", rail_map, "address"_a, "nbytes"_a, "memory_type"_a)
      .def("connect", rail_connect, "address"_a)
      .def("sweep", rail_sweep, "grace"_a)
      .def("close", rail_close, "timeout"_a)
      .def("serve", [](PyRail& self) { return self.rail->serve(); })
      .def("release", [](PyRail& self) {
        nb::gil_scoped_release release;
        self.rail->release();
      });
  nb::class_<PyMapping>(m, "Mapping")
      .def_prop_ro("key", [](PyMapping& self) { return to_bytes(unlocked([&] { return self.mapping->key(); })); })
      .def("unmap", [](PyMapping& self) { self.mapping->unmap(); }, Unlocked());
}

void bind_endpoint(nb::module_& m) {
  nb::class_<PyEndpoint>(m, "Endpoint")
      .def("unpack", endpoint_unpack, "key"_a, "address"_a, "nbytes"_a)
      .def("limit_reads", [](PyEndpoint& self, uint64_t nbytes) { self.endpoint->limit_reads(nbytes); }, "nbytes"_a)
      .def("close", [](PyEndpoint& self, int code) { self.endpoint->close(code); }, "code"_a, Unlocked())
      .def_prop_ro("code", [](PyEndpoint& self) { return self.endpoint->code(); })
      .def_prop_ro("status", endpoint_status)
      .def_prop_ro("is_gone", [](PyEndpoint& self) { return self.endpoint->is_gone(); })
      .def_prop_ro("transports", [](PyEndpoint& self) { return self.endpoint->transports(); }, Unlocked());
  nb::class_<PyRemoteKey>(m, "RemoteKey")
      .def("destroy", [](PyRemoteKey& self) { self.key->destroy(); }, Unlocked());
}

void bind_rma(nb::module_& m) {
  nb::class_<PyRma>(m, "Rma")
      .def("run", rma_run, "timeout"_a, "out_of_line"_a = false)
      .def_prop_ro("nbytes", [](PyRma& self) { return self.plan->nbytes(); })
      .def_prop_ro("count", [](PyRma& self) { return self.plan->count(); });
  nb::class_<PyRmaJob>(m, "RmaJob")
      .def("wait", rma_job_wait, "timeout"_a)
      .def("wait_settled", rma_job_wait_settled, "timeout"_a)
      .def("cancel", rma_job_cancel, "code"_a)
      .def("arm", [](PyRmaJob& self, int fd) { return arm(*self.job, fd); }, "fd"_a)
      .def_prop_ro("code", [](PyRmaJob& self) { return self.job->code(); }, Unlocked())
      .def_prop_ro("nbytes_done", [](PyRmaJob& self) { return self.job->nbytes_done(); })
      .def_prop_ro("settled", [](PyRmaJob& self) { return self.job->has_settled(); });
  m.def("rma", make_rma, "is_write"_a, "paths"_a, nb::arg("rows").noconvert(), "gates"_a, "inline_nbytes"_a);
}

}  // namespace

void bind_ucx(nb::module_& m) {
  bind_rail(m);
  bind_endpoint(m);
  bind_rma(m);
}

}  // namespace raynixl
