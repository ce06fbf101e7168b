// What expert parallelism needs: which row goes where, rows into a peer's memory, lines that say so, and sums of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include <string>
#include <vector>

#include "gate.h"

namespace raynixl {

// Tokens that each name some experts, and where the experts are.
struct Choice {
  const int64_t* ids;    // [tokens, topk]; -1 is none
  const float* weights;  // likewise, or null
  size_t tokens, topk;
  const int32_t* holder;  // [experts]: the rank that has it, -1 for nobody
  const int32_t* local;   // [experts]: its number there
  size_t experts, ranks;
};

// One row for each token and rank that holds an expert of it, ordered by rank, then token.
struct Routing {
  int32_t* order;      // [capacity]: the token of each row
  int64_t* counts;     // [ranks]: rows
  int64_t* starts;     // [tokens + 1]: where the rows of each token begin in positions
  int32_t* positions;  // [capacity]: rows of each token, ascending
  int32_t* row_ids;    // [capacity, topk]: local ids at that rank, -1 elsewhere
  float* row_weights;  // likewise, 0 elsewhere; or null
  size_t capacity;
};

// Fill a routing; returns the number of rows. Throws std::invalid_argument for an id that is none, or no room.
size_t route(const Choice& choice, const Routing& out);

// Rows of one length, to be laid end to end.
struct Rows {
  uint64_t source, stride, row_nbytes;
  const int32_t* index;  // which rows of the source, -1 for one of zeros; or null for all in order
  size_t count;
};

// Copy rows to `destination`, inside the gates. Returns 0, or the code of a gate that refused or stopped it.
int put_rows(const Rows& rows, uint64_t destination, const Gates& gates);

// One field of rows that are to be put: row i comes from source + index[i] * stride, or i * stride without an index.
struct Field {
  uint64_t source, stride, row_nbytes, index;  // index: the address of int32, or 0
};
static_assert(sizeof(Field) == 32);

// Where rows go: those of field f begin at base + starts[f], `offset` rows before the first that is put.
struct Target {
  uint64_t base, offset;
  const uint64_t* starts;
};

// Copy `count` rows from `first` on, field by field, inside the gates. Returns as put_rows does.
int put_fields(const Field* fields, size_t field_count, size_t first, size_t count, const Target& target,
               const Gates& gates);

// Ids that rows came with, on their way to who is told of them.
struct Ids {
  const int32_t* source;  // [count]
  size_t count;
  int32_t* copy;    // likewise
  int64_t* wide;    // likewise, or null
  int64_t* counts;  // [experts]: how often each occurs
  size_t experts;
};

// Copy, widen and count ids, -1 for none. Throws std::invalid_argument for one that is none.
void take_ids(const Ids& ids);

// A bell: two words of 32 bits that processes share. The first counts its rings; the second says at which count those
// asleep are to be woken, and is 0 when nobody sleeps. FUTEX_WAKE_OP of the twin counts too, and wakes always.
void ring(uint64_t bell);

struct Line {
  uint64_t address;
  const void* payload;
  size_t nbytes;
  uint64_t number, bell;  // no bell: 0
};

// Write what a line says behind its number, then its number, then count a ring, and wake who is due; inside the gates.
// Returns 0, or the code of a gate that refused.
int post_line(const Line& line, const Gates& gates);

// How rows and the line behind them reach one peer: made once for each slot of its, and used again and again.
struct Way {
  uint64_t cells[2], bell;  // where the lines of phases go, by parity
  Gates board;
  uint64_t base, capacity;  // of a slot, and how many rows it holds; 0 where there is none
  std::vector<uint64_t> starts;
  Gates memory;
  uint32_t slot;
};

// What one peer gets: `count` rows from `first` on, at `offset`, and the row at which what comes back begins.
struct Send {
  const Way* way;
  uint64_t first, count, offset, back;
};

// What all peers get of. The line is changed for each: at `told_at` it says what that one gets.
struct Parcel {
  const Field* fields;
  size_t field_count;
  uint64_t total;
  uint8_t* line;
  size_t line_nbytes, told_at;
};
constexpr size_t kToldNbytes = 20;

// Put rows, if any, then post the line.
enum class Sent : int { all = 0, no_rows = 1, no_line = 2 };
Sent send_rows(const Send& send, const Parcel& parcel);

// The words that somebody waits for. Both arrays are read anew at each look.
struct Lines {
  const uint64_t* addresses;
  const uint64_t* numbers;
  size_t count;

  // How many have their number or a higher one.
  size_t arrived() const;
};

// Wait until all have arrived, looking until `spin_until_ns` before sleeping. False at the deadline or a signal.
enum class Waited { all, timeout, interrupted };
Waited wait_lines(const Lines& lines, uint64_t bell, int64_t deadline_ns, int64_t spin_until_ns);

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

constexpr size_t itemsize_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Sums of rows, one for each token: terms in order in float32 (float64 for f64), rounded once, to nearest even.
struct Reduction {
  uint64_t target, target_stride;
  Type out;
  const int64_t* starts;  // [tokens + 1]: each token's rows
  size_t tokens;
  const uint64_t* rows;  // their addresses
  Type in;
  const float* weights;  // one for each row, or null
  const float* scale;    // one for each token, multiplies the sum of its rows; or null
  uint64_t hidden;       // elements in a row
  const uint64_t* biases;  // addresses of the first rows of what is added last
  size_t bias_count;
  uint64_t bias_stride;
  Type bias;
};

// The sum starts with its first term, so that one row is converted, and copied if that is all. Any NaN that is
// computed comes out as the canonical one. Returns 0, or the code of a gate.
// Variants differ in the instructions that they use, never in the bits; the last is the fastest here.
int reduce_rows(const Reduction& work, const Gates& gates, size_t variant);
size_t reduce_variants();

}  // namespace raynixl
