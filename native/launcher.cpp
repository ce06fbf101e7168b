#include "launcher.h"

#include <cstddef>

namespace raynixl {

int Launcher::run(void* stream, const uint64_t (&end)[3]) const {
  void* current = nullptr;
  if (calls_.get_current(&current) == 0 && current == context_) return start(stream, end);
  if (int code = calls_.push(context_)) return code;
  int code = start(stream, end);
  calls_.pop(&current);
  return code;
}

int Launcher::start(void* stream, const uint64_t (&end)[3]) const {
  if (int code = copy_one_by_one(calls_.copy, rows_.data(), rows_.size() / 3, stream)) return code;
  std::vector<void*> packed;
  packed.reserve(arguments_.size() + 3);
  for (const uint64_t& one : arguments_) packed.push_back(const_cast<uint64_t*>(&one));
  for (const uint64_t& one : end) packed.push_back(const_cast<uint64_t*>(&one));
  return calls_.launch(function_, grid_, 1, 1, threads_, 1, 1, 0, stream, packed.data(), nullptr);
}

}  // namespace raynixl
