#include "moe.h"

#include <cstring>

#include <algorithm>
#include <stdexcept>

#include "copy.h"

namespace raynixl {

namespace {

constexpr uint64_t kLookEvery = 256 << 10;  // bytes copied between two looks at the gates

// Where each rank's rows begin, and which rank has been given a row of the present token.
struct Places {
  explicit Places(size_t ranks) : next(ranks, 0), row(ranks, 0), token(ranks, -1) {}
  std::vector<int64_t> next;
  std::vector<int32_t> row;
  std::vector<int64_t> token;
};

[[noreturn]] void refuse(const Choice& choice, size_t at) {
  throw std::invalid_argument("token " + std::to_string(at / choice.topk) + " names expert " +
                              std::to_string(choice.ids[at]) + " of " + std::to_string(choice.experts));
}

// Count the rows for each rank; returns all.
size_t count_rows(const Choice& choice, int64_t* counts, Places& places) {
  std::fill_n(counts, choice.ranks, 0);
  for (size_t e = 0; e < choice.experts; ++e)
    if (choice.holder[e] < -1 || choice.holder[e] >= int64_t(choice.ranks))
      throw std::invalid_argument("expert " + std::to_string(e) + " is held by rank " +
                                  std::to_string(choice.holder[e]) + " of " + std::to_string(choice.ranks));
  size_t total = 0, at = 0;
  for (size_t t = 0; t < choice.tokens; ++t)
    for (size_t k = 0; k < choice.topk; ++k, ++at) {
      int64_t id = choice.ids[at];
      if (id == -1) continue;
      if (uint64_t(id) >= choice.experts) refuse(choice, at);
      int32_t rank = choice.holder[id];
      if (rank < 0 || places.token[rank] == int64_t(t)) continue;
      places.token[rank] = int64_t(t);
      ++counts[rank], ++total;
    }
  return total;
}

// Copy a piece of a row, or zeros if it has no source.
void put_piece(uint64_t target, uint64_t source, uint64_t nbytes, bool streams) {
  auto* to = reinterpret_cast<void*>(target);
  if (source == 0) return void(std::memset(to, 0, nbytes));
  auto* from = reinterpret_cast<const void*>(source);
  streams ? stream_block(to, from, nbytes) : copy_block(to, from, nbytes);
}

}  // namespace

size_t route(const Choice& choice, const Routing& out) {
  Places places(choice.ranks);
  size_t total = count_rows(choice, out.counts, places);
  if (total > out.capacity)
    throw std::invalid_argument(std::to_string(total) + " rows do not fit into " + std::to_string(out.capacity));
  for (size_t d = 1; d < choice.ranks; ++d) places.next[d] = places.next[d - 1] + out.counts[d - 1];
  std::fill(places.token.begin(), places.token.end(), -1);
  std::fill_n(out.row_ids, total * choice.topk, -1);
  if (out.row_weights) std::fill_n(out.row_weights, total * choice.topk, 0.0F);
  int64_t filled = 0;
  for (size_t t = 0, at = 0; t < choice.tokens; ++t) {
    out.starts[t] = filled;
    for (size_t k = 0; k < choice.topk; ++k, ++at) {
      int64_t id = choice.ids[at];
      if (id == -1) continue;
      int32_t rank = choice.holder[id];
      if (rank < 0) continue;
      if (places.token[rank] != int64_t(t)) {
        int32_t row = int32_t(places.next[rank]++);
        places.token[rank] = int64_t(t), places.row[rank] = row;
        out.order[row] = int32_t(t);
        int32_t* first = out.positions + out.starts[t];
        int32_t* place = out.positions + filled++;
        for (; place != first && place[-1] > row; --place) *place = place[-1];
        *place = row;
      }
      size_t cell = size_t(places.row[rank]) * choice.topk + k;
      out.row_ids[cell] = choice.local[id];
      if (out.row_weights) out.row_weights[cell] = choice.weights[at];
    }
  }
  out.starts[choice.tokens] = filled;
  return total;
}

int put_rows(const Rows& rows, uint64_t destination, const Gates& gates) {
  if (int code = gates.enter()) return code;
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
  gates.leave();
  return code;
}

}  // namespace raynixl
