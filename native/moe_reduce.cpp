// Compiled with -ffp-contract=off: a product that is added without having been rounded would be other bits.
#include "moe.h"

#include <cfenv>
#include <cmath>
#include <cstring>

#include <algorithm>
#include <bit>

#include "copy.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace raynixl {

namespace {

constexpr uint64_t kLookEvery = 256 << 10;  // bytes read between two looks at the gates

using SumToken = void (*)(const Reduction& work, size_t token);

// Float16 by integer arithmetic, as F16C does it.
float from_f16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 0) {
    float value = float(fraction) * 0x1p-24F;
    return sign ? -value : value;
  }
  uint32_t bits = exponent == 31 ? 0x7f80'0000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
  return std::bit_cast<float>(sign | bits);
}

uint16_t to_f16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fff'ffff;
  if (size > 0x7f80'0000) return uint16_t(sign | 0x7e00);
  if (size >= 0x4780'0000) return uint16_t(sign | 0x7c00);
  if (size < 0x3880'0000) {  // denormal in float16: the sum's last bit is worth 2^-24, and it is rounded there
    float shifted = std::bit_cast<float>(size) + 0.5F;
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f00'0000));
  }
  return uint16_t(sign | (size - 0x3800'0000 + 0xfff + (size >> 13 & 1)) >> 13);
}

template <typename T>
T read(uint64_t address) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
}

template <typename T>
void write(uint64_t address, T value) {
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

template <typename Sum>
Sum element(Type type, uint64_t row, size_t at) {
  switch (type) {
    case Type::f32: return Sum(read<float>(row + 4 * at));
    case Type::bf16: return Sum(std::bit_cast<float>(uint32_t(read<uint16_t>(row + 2 * at)) << 16));
    case Type::f16: return Sum(from_f16(read<uint16_t>(row + 2 * at)));
    default: return Sum(read<double>(row + 8 * at));
  }
}

template <typename Sum>
void put_element(Type type, uint64_t row, size_t at, Sum sum) {
  if (type == Type::f64)
    return write(row + 8 * at, std::isnan(sum) ? 0x7ff8'0000'0000'0000 : std::bit_cast<uint64_t>(double(sum)));
  uint32_t bits = std::isnan(sum) ? 0x7fc0'0000 : std::bit_cast<uint32_t>(float(sum));
  if (type == Type::f32) return write(row + 4 * at, bits);
  if (type == Type::f16) return write(row + 2 * at, to_f16(std::bit_cast<float>(bits)));
  write(row + 2 * at, uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// One element of a token, without vectors.
template <typename Sum>
void sum_element(const Reduction& work, size_t token, size_t at) {
  Sum sum = 0;
  int64_t first = work.starts[token], end = work.starts[token + 1];
  for (int64_t row = first; row < end; ++row) {
    Sum term = element<Sum>(work.in, work.rows[row], at) * Sum(work.weights ? work.weights[row] : 1.0F);
    sum = row == first ? term : sum + term;
  }
  if (work.scale && end > first) sum = sum * Sum(work.scale[token]);
  for (size_t b = 0; b < work.bias_count; ++b) {
    Sum term = element<Sum>(work.bias, work.biases[b] + token * work.bias_stride, at);
    sum = b == 0 && end == first ? term : sum + term;
  }
  put_element(work.out, work.target + token * work.target_stride, at, sum);
}

void sum_token_f64(const Reduction& work, size_t token) {
  for (size_t at = 0; at < work.hidden; ++at) sum_element<double>(work, token, at);
}

namespace portable {
#define MOE_TARGET_FUNCTION
#define MOE_TARGET inline __attribute__((always_inline))
#define MOE_LANES 4
#define MOE_F16 0
#include "moe_sum.h"
#undef MOE_TARGET_FUNCTION
#undef MOE_TARGET
#undef MOE_LANES
#undef MOE_F16
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define MOE_TARGET_FUNCTION __attribute__((target("avx2,f16c")))
#define MOE_TARGET inline __attribute__((target("avx2,f16c"), always_inline))
#define MOE_LANES 8
#define MOE_F16 8
#include "moe_sum.h"
#undef MOE_TARGET_FUNCTION
#undef MOE_TARGET
#undef MOE_LANES
#undef MOE_F16
}  // namespace avx2

namespace avx512 {
#define MOE_TARGET_FUNCTION __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define MOE_TARGET inline __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline))
#define MOE_LANES 16
#define MOE_F16 16
#include "moe_sum.h"
#undef MOE_TARGET_FUNCTION
#undef MOE_TARGET
#undef MOE_LANES
#undef MOE_F16
}  // namespace avx512
#endif

using Sums = const SumToken (*)[2];

std::vector<Sums> variants() {
  std::vector<Sums> found = {portable::kSums};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found.push_back(avx2::kSums);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(avx512::kSums);
#endif
  return found;
}

// Round to nearest even, denormals kept, whatever this thread has been set to.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  DefaultRounding(const DefaultRounding&) = delete;
  ~DefaultRounding() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

bool is_copy(const Reduction& work, size_t token) {
  return work.starts[token + 1] - work.starts[token] == 1 && work.in == work.out && !work.weights && !work.scale &&
         work.bias_count == 0;
}

}  // namespace

size_t reduce_variants() {
  static const size_t count = variants().size();
  return count;
}

int reduce_rows(const Reduction& work, const Gates& gates, size_t variant) {
  static const auto all = variants();
  if (int code = gates.enter()) return code;
  DefaultRounding rounding;
  SumToken sum = all[std::min(variant, all.size() - 1)][int(work.in)][work.weights != nullptr];
  uint64_t row_nbytes = work.hidden * itemsize_of(work.in), read_nbytes = 0;
  int code = 0;
  for (size_t t = 0; t < work.tokens && code == 0; ++t) {
    if (is_copy(work, t)) {
      auto* to = reinterpret_cast<void*>(work.target + t * work.target_stride);
      copy_block(to, reinterpret_cast<const void*>(work.rows[work.starts[t]]), row_nbytes);
    } else {
      sum(work, t);
    }
    read_nbytes += row_nbytes * uint64_t(work.starts[t + 1] - work.starts[t] + 1);
    if (read_nbytes >= kLookEvery) read_nbytes = 0, code = gates.aborted();
  }
  gates.leave();
  return code;
}

}  // namespace raynixl
