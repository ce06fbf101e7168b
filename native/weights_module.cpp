// Python's view of what weights need of the core. raynixl/native/__init__.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>

#include "copy.h"
#include "delta.h"
#include "digest.h"
#include "python.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

using DigestRows = nb::ndarray<const uint64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using DeltaRows = DigestRows;
using CopyRows = nb::ndarray<const uint64_t, nb::shape<-1, 5>, nb::c_contig, nb::device::cpu>;
using Arenas = nb::ndarray<const uint64_t, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DigestSums = nb::ndarray<uint64_t, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;

// Returns the bytes of all rows.
uint64_t check(const DigestRow* rows, size_t count, size_t sums) {
  uint64_t total = 0;
  for (const DigestRow* row = rows; row != rows + count; ++row) {
    if (row->index >= sums) throw nb::value_error("a row has the index of no sum");
    if (row->address + row->nbytes < row->address || row->position + row->nbytes < row->position)
      throw nb::value_error("a row reaches past the end of memory, or of all positions");
    total += row->nbytes;
  }
  return total;
}

void digest_rows_of(const DigestRows& rows, const DigestSums& out, uint64_t seed) {
  static_assert(sizeof(DigestRow) == 4 * sizeof(uint64_t) && sizeof(DigestSum) == 2 * sizeof(uint64_t));
  auto* first = reinterpret_cast<const DigestRow*>(rows.data());
  auto* sums = reinterpret_cast<DigestSum*>(out.data());
  size_t count = rows.shape(0);
  if (check(first, count, out.shape(0)) <= kKeepGil) return digest_rows(first, count, sums, seed);
  nb::gil_scoped_release release;
  digest_rows(first, count, sums, seed);
}

void digest_copy_rows(const CopyRows& rows, const DigestSums& out, uint64_t seed) {
  static_assert(sizeof(CopyRow) == 5 * sizeof(uint64_t));
  auto* first = reinterpret_cast<const CopyRow*>(rows.data());
  auto* sums = reinterpret_cast<DigestSum*>(out.data());
  size_t count = rows.shape(0);
  for (const CopyRow* row = first; row != first + count; ++row) {
    if (row->index >= out.shape(0)) throw nb::value_error("a row has the index of no sum");
    if (row->source + row->nbytes < row->source || row->destination + row->nbytes < row->destination ||
        row->position + row->nbytes < row->position)
      throw nb::value_error("a row reaches past the end of memory, or of all positions");
  }
  nb::gil_scoped_release release;
  digest_copy(first, count, sums, seed, true);
  stream_fence();
}

bool is_itemsize(uint64_t itemsize) { return itemsize <= 16 && std::has_single_bit(itemsize); }

// Returns the bytes of all rows.
uint64_t check(const DeltaRow* rows, size_t count, uint64_t itemsize) {
  if (!is_itemsize(itemsize)) throw nb::value_error("an item has 1, 2, 4, 8 or 16 bytes");
  uint64_t total = 0, end = 0;
  for (const DeltaRow* row = rows; row != rows + count; ++row) {
    if (row->before + row->nbytes < row->before || row->after + row->nbytes < row->after ||
        row->position + row->nbytes < row->position)
      throw nb::value_error("a row reaches past the end of memory, or of all positions");
    if (row->nbytes % itemsize != 0 || row->position % itemsize != 0)
      throw nb::value_error("a row does not consist of whole items");
    if (row->position < end) throw nb::value_error("rows must ascend in position, and be disjoint");
    end = row->position + row->nbytes;
    total += row->nbytes;
  }
  return total;
}

nb::object delta_encode_rows(const DeltaRows& rows, uint64_t itemsize, uint64_t limit) {
  static_assert(sizeof(DeltaRow) == 4 * sizeof(uint64_t));
  auto* first = reinterpret_cast<const DeltaRow*>(rows.data());
  size_t count = rows.shape(0);
  check(first, count, itemsize);
  Delta delta;
  bool fits;
  {
    nb::gil_scoped_release release;
    fits = delta_encode(first, count, itemsize, limit, delta);
  }
  if (!fits) return nb::none();
  return nb::make_tuple(nb::bytes(delta.gaps.data(), delta.gaps.size()),
                        nb::bytes(delta.values.data(), delta.values.size()));
}

bool delta_apply_to(const Bytes& gaps, const Bytes& values, uint64_t itemsize, const Arenas& arenas, bool write) {
  static_assert(sizeof(Arena) == 2 * sizeof(uint64_t));
  if (!is_itemsize(itemsize)) throw nb::value_error("an item has 1, 2, 4, 8 or 16 bytes");
  if (values.size() % itemsize != 0) throw nb::value_error("the values are not whole items");
  DeltaView delta = {gaps.data(), gaps.size(), values.data(), values.size() / itemsize, itemsize};
  auto* first = reinterpret_cast<const Arena*>(arenas.data());
  size_t count = arenas.shape(0);
  nb::gil_scoped_release release;
  return delta_apply(delta, first, count, write);
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def("digest_rows", digest_rows_of, nb::arg("rows").noconvert(), nb::arg("out").noconvert(), "seed"_a);
  m.def("digest_copy", digest_copy_rows, nb::arg("rows").noconvert(), nb::arg("out").noconvert(), "seed"_a);
  m.def("delta_encode", delta_encode_rows, nb::arg("rows").noconvert(), "itemsize"_a, "limit"_a);
  m.def("delta_apply", delta_apply_to, nb::arg("gaps").noconvert(), nb::arg("values").noconvert(), "itemsize"_a,
        nb::arg("arenas").noconvert(), nb::kw_only(), "write"_a);
}

}  // namespace raynixl
