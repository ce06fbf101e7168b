// Sums of rows for one set of instructions. Included once for each by moe_reduce.cpp, inside a namespace of its own, with
// MOE_TARGET (attributes of its functions), MOE_LANES (floats in a vector) and MOE_F16 (whether F16C may be used)
// defined: the arithmetic is the same everywhere, so that the bits are, too.

using Floats = float __attribute__((vector_size(4 * MOE_LANES)));
using Words = uint32_t __attribute__((vector_size(4 * MOE_LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * MOE_LANES)));

constexpr size_t kVectors = 8;  // summed at a time, in registers
constexpr size_t kTile = kVectors * MOE_LANES;

template <typename Vector>
MOE_TARGET Vector load(const char* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
MOE_TARGET void store(char* to, const Vector& v) {
  std::memcpy(to, &v, sizeof v);
}

MOE_TARGET Floats widen_f16(const char* from) {
#if MOE_F16 == 16
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif MOE_F16 == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Floats v;
  for (size_t i = 0; i < MOE_LANES; ++i) v[i] = from_f16(load<uint16_t>(from + 2 * i));
  return v;
#endif
}

MOE_TARGET void narrow_f16(char* to, const Floats& v) {
#if MOE_F16 == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif MOE_F16 == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (size_t i = 0; i < MOE_LANES; ++i) store(to + 2 * i, to_f16(v[i]));
#endif
}

template <Type type>
MOE_TARGET Floats widen(const char* from) {
  if constexpr (type == Type::f32) return load<Floats>(from);
  if constexpr (type == Type::f16) return widen_f16(from);
  return Floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Round to nearest even and store; NaNs become the canonical one.
MOE_TARGET void narrow(Type type, char* to, Floats v) {
  Words is_nan = Words(v != v);
  Words bits = (Words(v) & ~is_nan) | (is_nan & 0x7fc0'0000);
  if (type == Type::f32) return store(to, bits);
  if (type == Type::f16) return narrow_f16(to, Floats(bits));
  store(to, __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves));
}

MOE_TARGET void add_bias(Type type, Floats* sums, const char* from, size_t vectors, bool first) {
  size_t step = MOE_LANES * itemsize_of(type);
  for (size_t i = 0; i < vectors; ++i, from += step) {
    Floats v = type == Type::f32 ? widen<Type::f32>(from)
               : type == Type::f16 ? widen<Type::f16>(from)
                                   : widen<Type::bf16>(from);
    sums[i] = first ? v : sums[i] + v;
  }
}

// Add up `vectors` vectors of a token from element `at` on.
template <Type in, size_t vectors>
MOE_TARGET void sum_some(const Reduction& work, size_t token, size_t at, char* to) {
  constexpr size_t step = MOE_LANES * itemsize_of(in);
  Floats sums[vectors] = {};
  int64_t first = work.starts[token], end = work.starts[token + 1];
  for (int64_t row = first; row < end; ++row) {
    auto* from = reinterpret_cast<const char*>(work.rows[row]) + at * itemsize_of(in);
    float weight = work.weights ? work.weights[row] : 1.0F;
    for (size_t i = 0; i < vectors; ++i) {
      Floats term = widen<in>(from + i * step) * weight;
      sums[i] = row == first ? term : sums[i] + term;
    }
  }
  if (work.scale && end > first)
    for (Floats& sum : sums) sum = sum * work.scale[token];
  for (size_t b = 0; b < work.bias_count; ++b) {
    uint64_t bias = work.biases[b] + token * work.bias_stride + at * itemsize_of(work.bias);
    add_bias(work.bias, sums, reinterpret_cast<const char*>(bias), vectors, b == 0 && end == first);
  }
  for (size_t i = 0; i < vectors; ++i) narrow(work.out, to + i * MOE_LANES * itemsize_of(work.out), sums[i]);
}

template <Type in>
MOE_TARGET_FUNCTION void sum_token(const Reduction& work, size_t token) {
  auto* to = reinterpret_cast<char*>(work.target + token * work.target_stride);
  size_t itemsize = itemsize_of(work.out), at = 0;
  for (; at + kTile <= work.hidden; at += kTile) sum_some<in, kVectors>(work, token, at, to + at * itemsize);
  for (; at + MOE_LANES <= work.hidden; at += MOE_LANES) sum_some<in, 1>(work, token, at, to + at * itemsize);
  for (; at < work.hidden; ++at) sum_element<float>(work, token, at);
}

constexpr SumToken kSums[] = {sum_token<Type::f32>, sum_token<Type::bf16>, sum_token<Type::f16>, sum_token_f64};
