#include "moe.h"

#include <cstring>

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "copy.h"

namespace raynixl {

namespace {

constexpr uint64_t kLookEvery = 256 << 10;  // bytes copied between two looks at the gates

[[noreturn]] void refuse(const Choice& choice, size_t at) {
  throw std::invalid_argument("token " + std::to_string(at / choice.topk) + " names expert " +
                              std::to_string(choice.ids[at]) + " of " + std::to_string(choice.experts));
}

void check_holders(const Choice& choice) {
  for (size_t e = 0; e < choice.experts; ++e)
    if (choice.holder[e] < -1 || choice.holder[e] >= int64_t(choice.ranks))
      throw std::invalid_argument("expert " + std::to_string(e) + " is held by rank " +
                                  std::to_string(choice.holder[e]) + " of " + std::to_string(choice.ranks));
}

// Which ranks each token goes to: as a set of bits, since what a token chooses is nothing a branch could foresee.
class Destinations {
 public:
  explicit Destinations(const Choice& choice)
      : words_((choice.ranks + 63) / 64), sets_(choice.tokens * words_, 0), ranks_(choice.tokens * choice.topk, -1) {
    for (size_t t = 0, at = 0; t < choice.tokens; ++t)
      for (size_t k = 0; k < choice.topk; ++k, ++at) {
        int64_t id = choice.ids[at];
        if (id == -1) continue;
        if (uint64_t(id) >= choice.experts) refuse(choice, at);
        int32_t rank = choice.holder[id];
        if (rank < 0) continue;
        ranks_[at] = rank;
        sets_[t * words_ + size_t(rank) / 64] |= uint64_t(1) << rank % 64;
      }
  }

  // The rank of each of a token's pairs, -1 for none.
  const int32_t* ranks(size_t pair) const { return ranks_.data() + pair; }

  // Visit the ranks of a token, ascending.
  template <typename Visit>
  void each(size_t token, Visit visit) const {
    for (size_t w = 0; w < words_; ++w)
      for (uint64_t set = sets_[token * words_ + w]; set != 0; set &= set - 1)
        visit(w * 64 + size_t(std::countr_zero(set)));
  }

 private:
  size_t words_;
  std::vector<uint64_t> sets_;
  std::vector<int32_t> ranks_;
};

// Copy a piece of a row, or zeros if it has no source.
void put_piece(uint64_t target, uint64_t source, uint64_t nbytes, bool streams) {
  auto* to = reinterpret_cast<void*>(target);
  if (source == 0) return void(std::memset(to, 0, nbytes));
  auto* from = reinterpret_cast<const void*>(source);
  streams ? stream_block(to, from, nbytes) : copy_block(to, from, nbytes);
}

}  // namespace

size_t route(const Choice& choice, const Routing& out) {
  check_holders(choice);
  Destinations destinations(choice);
  std::fill_n(out.counts, choice.ranks, 0);
  for (size_t t = 0; t < choice.tokens; ++t) destinations.each(t, [&](size_t rank) { ++out.counts[rank]; });
  std::vector<int64_t> next(choice.ranks), row(choice.ranks);
  std::exclusive_scan(out.counts, out.counts + choice.ranks, next.begin(), int64_t(0));
  size_t total = size_t(std::accumulate(out.counts, out.counts + choice.ranks, int64_t(0)));
  if (total > out.capacity)
    throw std::invalid_argument(std::to_string(total) + " rows do not fit into " + std::to_string(out.capacity));
  std::fill_n(out.row_ids, total * choice.topk, -1);
  if (out.row_weights) std::fill_n(out.row_weights, total * choice.topk, 0.0F);
  int64_t filled = 0;
  for (size_t t = 0; t < choice.tokens; ++t) {
    out.starts[t] = filled;
    destinations.each(t, [&](size_t rank) {
      row[rank] = next[rank]++;
      out.order[row[rank]] = int32_t(t);
      out.positions[filled++] = int32_t(row[rank]);
    });
    const int32_t* ranks = destinations.ranks(t * choice.topk);
    for (size_t k = 0, at = t * choice.topk; k < choice.topk; ++k, ++at) {
      if (ranks[k] < 0) continue;
      size_t cell = size_t(row[size_t(ranks[k])]) * choice.topk + k;
      out.row_ids[cell] = choice.local[choice.ids[at]];
      if (out.row_weights) out.row_weights[cell] = choice.weights[at];
    }
  }
  out.starts[choice.tokens] = filled;
  return total;
}

namespace {

// Copy rows; returns 0, or the code of a gate that stopped it. The gates have been entered.
int copy_rows(const Rows& rows, uint64_t destination, const Gates& gates) {
  // With 4 processes on 2 cores that put rows of 14 KiB to each other and then read theirs: through the cache 1.8 ms
  // against 1.8 streamed at 1.6 MB for each, 3.4 against 3.5 at 3.3 MB, 11.4 against 8.4 at 6.6 MB, 78 against 65 at
  // 53 MB. One pair alone gains by streaming from 16 MB only.
  bool streams = rows.row_nbytes >= kStreamBlock && rows.count * rows.row_nbytes > kStreamAbove;
  uint64_t copied = 0;
  int code = 0;
  for (size_t i = 0; i < rows.count && code == 0; ++i) {
    int64_t which = rows.index ? int64_t(rows.index[i]) : int64_t(i);
    uint64_t source = rows.source + uint64_t(which) * rows.stride, target = destination + i * rows.row_nbytes;
    for (uint64_t left = rows.row_nbytes; left > 0 && code == 0;) {
      uint64_t step = std::min(left, kLookEvery);
      put_piece(target, which < 0 ? 0 : source, step, streams);
      left -= step, target += step, source += step, copied += step;
      if (copied >= kLookEvery) copied = 0, code = gates.aborted();
    }
  }
  if (streams) stream_fence();
  return code;
}

}  // namespace

int put_rows(const Rows& rows, uint64_t destination, const Gates& gates) {
  if (int code = gates.enter()) return code;
  int code = copy_rows(rows, destination, gates);
  gates.leave();
  return code;
}

int put_fields(const Field* fields, size_t field_count, size_t first, size_t count, const Target& target,
               const Gates& gates) {
  if (int code = gates.enter()) return code;
  int code = 0;
  for (size_t f = 0; f < field_count && code == 0; ++f) {
    const Field& field = fields[f];
    auto* index = reinterpret_cast<const int32_t*>(field.index);
    uint64_t source = field.source + (index ? 0 : first * field.stride);
    Rows rows = {source, field.stride, field.row_nbytes, index ? index + first : nullptr, count};
    code = copy_rows(rows, target.base + target.starts[f] + target.offset * field.row_nbytes, gates);
  }
  gates.leave();
  return code;
}

void take_ids(const Ids& ids) {
  std::fill_n(ids.counts, ids.experts, 0);
  for (size_t i = 0; i < ids.count; ++i) {
    int32_t id = ids.source[i];
    ids.copy[i] = id;
    if (ids.wide) ids.wide[i] = id;
    if (id == -1) continue;
    if (uint32_t(id) >= ids.experts)
      throw std::invalid_argument("expert " + std::to_string(id) + " of " + std::to_string(ids.experts));
    ++ids.counts[id];
  }
}

}  // namespace raynixl
