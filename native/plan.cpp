#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace raynixl {

namespace {

constexpr uint64_t kCopyPiece = 1 << 20;
constexpr uint64_t kVmPiece = 4 << 20;
constexpr size_t kPieceSegments = 4096;  // bounds how long a piece of tiny segments keeps a thread from looking up

}  // namespace

Plan::Plan(Mode mode, pid_t pid, std::vector<Segment> segments, std::vector<std::shared_ptr<Gate>> gates)
    : mode_(mode), pid_(pid), count_(segments.size()), gates_(std::move(gates)) {
  if (segments.empty()) throw std::invalid_argument("a program needs at least one segment");
  for (const Segment& s : segments) {
    if (s.nbytes == 0) throw std::invalid_argument("a segment of 0 bytes");
    bool wraps = s.source + s.nbytes < s.source || s.destination + s.nbytes < s.destination;
    if (wraps || nbytes_ + s.nbytes < nbytes_) throw std::invalid_argument("a segment reaches past the end of memory");
    nbytes_ += s.nbytes;
  }
  stream_ = mode == Mode::copy && nbytes_ > kStreamAbove;
  cut(std::move(segments));
  if (mode != Mode::copy && count_ == 1 && nbytes_ <= kProcessFileBlock) file_ = ProcessFile::of(pid);
}

void Plan::cut(std::vector<Segment> segments) {
  const uint64_t limit = mode_ == Mode::copy ? kCopyPiece : kVmPiece;
  bool split = std::any_of(segments.begin(), segments.end(), [&](const Segment& s) { return s.nbytes > limit; });
  if (split) {
    for (Segment s : segments) {
      for (; s.nbytes > limit; s.source += limit, s.destination += limit, s.nbytes -= limit)
        segments_.push_back({s.source, s.destination, limit});
      segments_.push_back(s);
    }
  } else {
    segments_ = std::move(segments);
  }
  pieces_.push_back(0);
  uint64_t nbytes = 0;
  for (size_t i = 0; i < segments_.size(); ++i) {
    bool full = nbytes + segments_[i].nbytes > limit || i - pieces_.back() >= kPieceSegments;
    if (i > pieces_.back() && full) pieces_.push_back(i), nbytes = 0;
    nbytes += segments_[i].nbytes;
  }
  pieces_.push_back(segments_.size());
}

uint64_t Plan::piece_nbytes(size_t piece) const {
  uint64_t nbytes = 0;
  for (size_t i = pieces_[piece]; i < pieces_[piece + 1]; ++i) nbytes += segments_[i].nbytes;
  return nbytes;
}

int Plan::copy(size_t piece) const {
  const Segment* segment = &segments_[pieces_[piece]];
  size_t count = pieces_[piece + 1] - pieces_[piece];
  if (file_ && file_->move(mode_, *segment)) return 0;  // if not, process_vm says why, or finds the process anew
  if (mode_ != Mode::copy) return move_segments(mode_, pid_, segment, count);
  for (const Segment* end = segment + count; segment != end; ++segment) {
    auto* to = reinterpret_cast<void*>(segment->destination);
    auto* from = reinterpret_cast<const void*>(segment->source);
    if (stream_ && segment->nbytes >= kStreamBlock)
      stream_block(to, from, segment->nbytes);
    else
      copy_block(to, from, segment->nbytes);
  }
  if (stream_) stream_fence();
  return 0;
}

void Plan::copy(size_t piece, const Digest& digest, DigestSum& sum) const {
  for (size_t i = pieces_[piece]; i < pieces_[piece + 1]; ++i) {
    const Segment& s = segments_[i];
    CopyRow row = {s.source, s.destination, s.nbytes, s.destination + digest.shift, 0};
    digest_copy(&row, 1, &sum, digest.seed, stream_ && s.nbytes >= kStreamBlock);
  }
  if (stream_) stream_fence();
}

}  // namespace raynixl
