#include "moe.h"

#include <cstring>

namespace raynixl {

namespace {

constexpr uint32_t kNowhere = 0xffff'ffff;

// What a line says of the rows before it, as raynixl/moe/lines.py has it.
struct Told {
  uint32_t place, offset, count, back, total;
};
static_assert(sizeof(Told) == kToldNbytes);

}  // namespace

Sent send_rows(const Send& send, const Parcel& parcel) {
  const Way& way = *send.way;
  Told told = {kNowhere, 0, uint32_t(send.count), uint32_t(send.back), uint32_t(parcel.total)};
  if (send.count > 0) {
    if (way.starts.size() != parcel.field_count || send.offset + send.count > way.capacity) return Sent::no_rows;
    Target target = {way.base, send.offset, way.starts.data()};
    if (put_fields(parcel.fields, parcel.field_count, send.first, send.count, target, way.memory)) return Sent::no_rows;
    told.place = way.slot, told.offset = uint32_t(send.offset);
  }
  std::memcpy(parcel.line + parcel.told_at, &told, sizeof told);
  uint64_t number;
  std::memcpy(&number, parcel.line, sizeof number);
  Line line = {way.cells[number & 1], parcel.line + 8, parcel.line_nbytes - 8, number, way.bell};
  return post_line(line, way.board) ? Sent::no_line : Sent::all;
}

}  // namespace raynixl
