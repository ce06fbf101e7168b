// Python's view of what weights need of the core. raynixl/native/__init__.py says what each name promises.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "digest.h"
#include "python.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace raynixl {

namespace {

using DigestRows = nb::ndarray<const uint64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
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

}  // namespace

void bind_weights(nb::module_& m) {
  m.def("digest_rows", digest_rows_of, nb::arg("rows").noconvert(), nb::arg("out").noconvert(), "seed"_a);
}

}  // namespace raynixl
