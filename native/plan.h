// Plan: a list of segments cut into pieces once, and executed many times by many threads.
#pragma once

#include <cstdint>

#include <memory>
#include <vector>

#include "copy.h"
#include "digest.h"
#include "gate.h"

namespace raynixl {

class Plan {
 public:
  // Raises std::invalid_argument for an empty list, an empty segment or one that wraps around.
  Plan(Mode mode, pid_t pid, std::vector<Segment> segments, std::vector<std::shared_ptr<Gate>> gates);

  uint64_t nbytes() const { return nbytes_; }
  size_t count() const { return count_; }
  size_t pieces() const { return pieces_.size() - 1; }
  uint64_t piece_nbytes(size_t piece) const;

  // Enter every gate, or none: returns 0, or the code of the one that refused.
  int enter() const { return gates_.enter(); }
  void leave() const { gates_.leave(); }
  // The code of the first gate that is closed, 0 if all are open.
  int closed() const { return gates_.aborted(); }

  // Copy one piece. Returns 0 or -errno.
  int copy(size_t piece) const;

  // What a run digests as it copies: bytes that go to address a have the position a + shift.
  struct Digest {
    uint64_t shift;
    uint64_t seed;
  };
  bool can_digest() const { return mode_ == Mode::copy; }
  // Copy one piece, and add its digest.
  void copy(size_t piece, const Digest& digest, DigestSum& sum) const;

 private:
  void cut(std::vector<Segment> segments);

  Mode mode_;
  pid_t pid_;
  bool stream_ = false;
  std::shared_ptr<ProcessFile> file_;
  uint64_t nbytes_ = 0;
  size_t count_ = 0;
  std::vector<Segment> segments_;  // those too large for one piece are split here
  std::vector<size_t> pieces_;     // piece i is segments_[pieces_[i] .. pieces_[i + 1])
  Gates gates_;
};

}  // namespace raynixl
