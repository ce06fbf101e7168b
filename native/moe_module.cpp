// Python's view of what expert parallelism needs of the core. raynixl/native/moe.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "moe.h"
#include "python.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

template <typename T, int dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
template <typename T, int dimensions>
using MaybeArray = std::optional<Array<T, dimensions>>;

template <typename Maybe>
auto* data_of(const Maybe& array) {
  return array ? array->data() : nullptr;
}

Gates gates_of(const nb::sequence& gates) {
  std::vector<std::shared_ptr<Gate>> doors;
  for (nb::handle gate : gates) doors.push_back(nb::cast<PyGate&>(gate, false).gate);
  return Gates(std::move(doors));
}

void need(bool fits, const char* what) {
  if (!fits) throw nb::value_error(what);
}

void check_routing(const Choice& choice, const Routing& out, const MaybeArray<const float, 2>& weights, size_t local) {
  need(!weights || (weights->shape(0) == choice.tokens && weights->shape(1) == choice.topk),
       "there is a weight for each id, or none");
  need(local == choice.experts, "`holder` and `local` differ in length");
  need(!choice.weights == !out.row_weights, "weights come out if they go in, and only then");
}

size_t route_of(const Array<const int64_t, 2>& ids, const MaybeArray<const float, 2>& weights,
                const Array<const int32_t, 1>& holder, const Array<const int32_t, 1>& local,
                const Array<int32_t, 1>& order, const Array<int64_t, 1>& counts, const Array<int64_t, 1>& starts,
                const Array<int32_t, 1>& positions, const Array<int32_t, 2>& row_ids,
                const MaybeArray<float, 2>& row_weights) {
  Choice choice = {ids.data(),  data_of(weights), ids.shape(0),    ids.shape(1),
                   holder.data(), local.data(),   holder.shape(0), counts.shape(0)};
  Routing out = {order.data(),   counts.data(),        starts.data(), positions.data(),
                 row_ids.data(), data_of(row_weights), order.shape(0)};
  check_routing(choice, out, weights, local.shape(0));
  need(starts.shape(0) == choice.tokens + 1, "there is a start for each token, and an end");
  need(positions.shape(0) >= out.capacity && row_ids.shape(0) >= out.capacity &&
           (!row_weights || row_weights->shape(0) >= out.capacity),
       "not all outputs have the length of `order`");
  need(row_ids.shape(1) == choice.topk && (!row_weights || row_weights->shape(1) == choice.topk),
       "outputs are as wide as the ids");
  nb::gil_scoped_release release;
  return route(choice, out);  // std::invalid_argument becomes ValueError
}

int put_rows_of(uint64_t src, uint64_t src_stride, uint64_t row_nbytes, const MaybeArray<const int32_t, 1>& index,
                uint64_t dst, const nb::sequence& gates, size_t count) {
  need(!index || index->shape(0) >= count, "the index is shorter than the rows");
  Rows rows = {src, src_stride, row_nbytes, data_of(index), count};
  Gates doors = gates_of(gates);
  if (count * row_nbytes <= kKeepGil) return put_rows(rows, dst, doors);
  nb::gil_scoped_release release;
  return put_rows(rows, dst, doors);
}

int put_fields_of(const Array<const uint64_t, 2>& fields, uint64_t first, const Array<const uint64_t, 1>& starts,
                  uint64_t base, uint64_t offset, const nb::sequence& gates, uint64_t count) {
  need(fields.shape(1) == 4, "a field has a source, a stride, a length, and the address of an index");
  need(starts.shape(0) == fields.shape(0), "there is a start for each field");
  auto* table = reinterpret_cast<const Field*>(fields.data());
  size_t n = fields.shape(0), nbytes = 0;
  for (size_t f = 0; f < n; ++f) nbytes += count * table[f].row_nbytes;
  Target target = {base, offset, starts.data()};
  Gates doors = gates_of(gates);
  if (nbytes <= kKeepGil) return put_fields(table, n, first, count, target, doors);
  nb::gil_scoped_release release;
  return put_fields(table, n, first, count, target, doors);
}

void take_ids_of(uint64_t source, const Array<int32_t, 2>& copy, const MaybeArray<int64_t, 2>& wide,
                 const Array<int64_t, 1>& counts) {
  need(!wide || (wide->shape(0) == copy.shape(0) && wide->shape(1) == copy.shape(1)), "the outputs differ in shape");
  need(source % 4 == 0, "ids are aligned to 4 bytes");
  take_ids({reinterpret_cast<const int32_t*>(source), copy.size(), copy.data(), data_of(wide), counts.data(),
            counts.shape(0)});
}

// The bytes of an object that has some, as long as it lives.
class View {
 public:
  explicit View(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      throw nb::type_error("a payload is bytes, or a C-contiguous array");
    }
  }
  View(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }
  const void* data() const { return view_.buf; }
  size_t nbytes() const { return size_t(view_.len); }

 private:
  Py_buffer view_;
};

void check_bell(uint64_t bell) { need(bell % 8 == 0, "a bell is aligned to 8 bytes"); }

int post_line_of(uint64_t address, nb::handle payload, uint64_t number, uint64_t bell, const nb::sequence& gates) {
  need(address % 8 == 0, "a line is aligned to 8 bytes");
  check_bell(bell);
  View view(payload);
  return post_line({address, view.data(), view.nbytes(), number, bell}, gates_of(gates));
}

void ring_of(uint64_t bell) {
  check_bell(bell);
  ring(bell);
}

size_t wait_lines_of(const Array<const uint64_t, 1>& addresses, const Array<const uint64_t, 1>& numbers, uint64_t bell,
                     double timeout, double spin) {
  Lines lines = {addresses.data(), numbers.data(), addresses.shape(0)};
  need(numbers.shape(0) == lines.count, "there is a number for each address");
  need(bell != 0, "a wait needs a bell");
  check_bell(bell);
  for (size_t i = 0; i < lines.count; ++i) need(lines.addresses[i] % 8 == 0, "a line is aligned to 8 bytes");
  if (lines.arrived() == lines.count) return lines.count;
  int64_t deadline = deadline_after(timeout), spin_until = deadline_after(spin);
  for (;;) {
    Waited waited;
    {
      nb::gil_scoped_release release;
      waited = wait_lines(lines, bell, deadline, spin_until);
    }
    if (waited == Waited::all) return lines.count;
    if (waited == Waited::timeout) return lines.arrived();
    check_signals();
  }
}

Way way_of(std::pair<uint64_t, uint64_t> cells, uint64_t bell, const nb::sequence& board, uint32_t slot, uint64_t base,
           uint64_t capacity, std::vector<uint64_t> starts, const nb::sequence& memory) {
  need(cells.first % 8 == 0 && cells.second % 8 == 0, "a line is aligned to 8 bytes");
  check_bell(bell);
  return {{cells.first, cells.second}, bell, gates_of(board), base, capacity, std::move(starts), gates_of(memory), slot};
}

std::vector<int> send_rows_of(const nb::sequence& sends, uint64_t total, const Array<const uint64_t, 2>& fields,
                              const Array<uint8_t, 1>& line, size_t told_at) {
  need(fields.shape(1) == 4, "a field has a source, a stride, a length, and the address of an index");
  need(told_at >= 8 && told_at <= line.size() && line.size() - told_at >= kToldNbytes, "a line has room for what it tells of rows");
  auto* table = reinterpret_cast<const Field*>(fields.data());
  Parcel parcel = {table, fields.shape(0), total, line.data(), line.size(), told_at};
  std::vector<Send> all;
  uint64_t rows = 0, row_nbytes = 0;
  for (nb::handle one : sends) {
    nb::tuple send = nb::cast<nb::tuple>(one);
    all.push_back({&nb::cast<Way&>(send[0], false), nb::cast<uint64_t>(send[1]), nb::cast<uint64_t>(send[2]),
                   nb::cast<uint64_t>(send[3]), nb::cast<uint64_t>(send[4])});
    rows += all.back().count;
  }
  for (size_t f = 0; f < parcel.field_count; ++f) row_nbytes += table[f].row_nbytes;
  std::vector<int> sent;
  auto send_all = [&] {
    for (const Send& send : all) sent.push_back(int(send_rows(send, parcel)));
  };
  if (rows * row_nbytes <= kKeepGil) {
    send_all();
  } else {
    nb::gil_scoped_release release;
    send_all();
  }
  return sent;
}

Type type_of(int code) {
  need(code >= 0 && code <= 3, "unknown type of elements");
  return Type(code);
}

void check_reduction(const Reduction& work, size_t rows, const MaybeArray<const float, 1>& weights,
                     const MaybeArray<const float, 1>& scale) {
  need(!weights || weights->shape(0) >= rows, "there is a weight for each row, or none");
  need(!scale || scale->shape(0) == work.tokens, "there is a scale for each token, or none");
  need(work.starts[0] >= 0 && work.starts[work.tokens] <= int64_t(rows), "starts beyond the rows");
  for (size_t t = 0; t < work.tokens; ++t) need(work.starts[t] <= work.starts[t + 1], "starts must ascend");
  need((work.in == Type::f64) == (work.out == Type::f64) &&
           (work.in == Type::f64 || work.bias_count == 0 || work.bias != Type::f64),
       "float64 goes only with float64");
}

int reduce_rows_of(uint64_t dst, uint64_t dst_stride, int out_code, const Array<const int64_t, 1>& starts,
                   const Array<const uint64_t, 1>& rows, int in_code, const MaybeArray<const float, 1>& weights,
                   uint64_t hidden, const Array<const uint64_t, 1>& biases, uint64_t bias_stride, int bias_code,
                   const nb::sequence& gates, const MaybeArray<const float, 1>& scale, size_t variant) {
  need(starts.shape(0) >= 1, "there is a start for each token, and an end");
  Reduction work = {dst,           dst_stride,    type_of(out_code), starts.data(),   starts.shape(0) - 1,
                    rows.data(),   type_of(in_code), data_of(weights), data_of(scale), hidden,
                    biases.data(), biases.shape(0), bias_stride,      type_of(bias_code)};
  check_reduction(work, rows.shape(0), weights, scale);
  Gates doors = gates_of(gates);
  if ((rows.shape(0) + work.tokens) * hidden <= kKeepGil / 4) return reduce_rows(work, doors, variant);
  nb::gil_scoped_release release;
  return reduce_rows(work, doors, variant);
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.attr("REDUCE_VARIANTS") = reduce_variants();
  m.def("route", route_of, nb::arg("ids").noconvert(), nb::arg("weights").noconvert().none(),
        nb::arg("holder").noconvert(), nb::arg("local").noconvert(), nb::arg("order").noconvert(),
        nb::arg("counts").noconvert(), nb::arg("starts").noconvert(), nb::arg("positions").noconvert(),
        nb::arg("row_ids").noconvert(), nb::arg("row_weights").noconvert().none());
  m.def("put_rows", put_rows_of, "src"_a, "src_stride"_a, "row_nbytes"_a, nb::arg("index").noconvert().none(), "dst"_a,
        "gates"_a, "count"_a);
  m.def("put_fields", put_fields_of, nb::arg("fields").noconvert(), "first"_a, nb::arg("starts").noconvert(), "base"_a,
        "offset"_a, "gates"_a, "count"_a);
  m.def("take_ids", take_ids_of, "source"_a, nb::arg("copy").noconvert(), nb::arg("wide").noconvert().none(),
        nb::arg("counts").noconvert());
  m.def("post_line", post_line_of, "address"_a, "payload"_a, "number"_a, "bell"_a,
        "gates"_a = nb::make_tuple());
  nb::class_<Way>(m, "Way")
      .def("__init__",
           [](Way* self, std::pair<uint64_t, uint64_t> cells, uint64_t bell, const nb::sequence& board, uint32_t slot,
              uint64_t base, uint64_t capacity, std::vector<uint64_t> starts, const nb::sequence& memory) {
             new (self) Way(way_of(cells, bell, board, slot, base, capacity, std::move(starts), memory));
           },
           "cells"_a, "bell"_a, "board"_a, "slot"_a, "base"_a, "capacity"_a, "starts"_a, "memory"_a)
      .def_ro("capacity", &Way::capacity);
  m.def("send_rows", send_rows_of, "sends"_a, "total"_a, nb::arg("fields").noconvert(), nb::arg("line").noconvert(),
        "told_at"_a);
  m.def("ring", ring_of, "bell"_a);
  m.def("wait_lines", wait_lines_of, nb::arg("addresses").noconvert(), nb::arg("numbers").noconvert(), "bell"_a,
        "timeout"_a, "spin"_a);
  m.def("reduce_rows", reduce_rows_of, "dst"_a, "dst_stride"_a, "out_code"_a, nb::arg("starts").noconvert(),
        nb::arg("rows").noconvert(), "in_code"_a, nb::arg("weights").noconvert().none(), "hidden"_a,
        nb::arg("biases").noconvert(), "bias_stride"_a, "bias_code"_a, "gates"_a,
        nb::arg("scale").noconvert().none() = nb::none(), "variant"_a = reduce_variants() - 1);
}

}  // namespace raynixl
