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

// The bits of floats, NaNs all alike.
MOE_TARGET Words canonical(Floats v) {
  Words is_nan = Words(v != v);
  return (Words(v) & ~is_nan) | (is_nan & 0x7fc0'0000);
}

// The upper 16 bits are rounded to nearest even; the lower ones are left over.
MOE_TARGET Words rounded(Words bits) { return bits + 0x7fff + (bits >> 16 & 1); }

// Round and store.
MOE_TARGET void narrow(Type type, char* to, Floats v) {
  Words bits = canonical(v);
  if (type == Type::f32) return store(to, bits);
  if (type == Type::f16) return narrow_f16(to, Floats(bits));
  store(to, __builtin_convertvector(rounded(bits) >> 16, Halves));
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
template <Type in, bool weighted, size_t vectors>
MOE_TARGET void sum_some(const Reduction& work, size_t token, size_t at, char* to) {
  constexpr size_t step = MOE_LANES * itemsize_of(in);
  Floats sums[vectors] = {};
  int64_t first = work.starts[token], end = work.starts[token + 1];
  for (int64_t row = first; row < end; ++row) {
    auto* from = reinterpret_cast<const char*>(work.rows[row]) + at * itemsize_of(in);
    for (size_t i = 0; i < vectors; ++i) {
      Floats term = widen<in>(from + i * step);
      if constexpr (weighted) term = term * work.weights[row];
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

template <Type in, bool weighted>
MOE_TARGET_FUNCTION void sum_token(const Reduction& work, size_t token) {
  auto* to = reinterpret_cast<char*>(work.target + token * work.target_stride);
  size_t itemsize = itemsize_of(work.out), at = 0;
  for (; at + kTile <= work.hidden; at += kTile)
    sum_some<in, weighted, kVectors>(work, token, at, to + at * itemsize);
  for (; at + MOE_LANES <= work.hidden; at += MOE_LANES)
    sum_some<in, weighted, 1>(work, token, at, to + at * itemsize);
  for (; at < work.hidden; ++at) sum_element<float>(work, token, at);
}

// bf16 to bf16 is the case that matters. A vector of pairs gives two of floats, of its even and of its odd elements,
// by a shift and a mask, where widening half a vector takes a shuffle besides; they go back into pairs at the end.
struct Pairs {
  Floats even, odd;
};

MOE_TARGET Pairs split(const char* from) {
  Words pairs = load<Words>(from);
  return {Floats(pairs << 16), Floats(pairs & 0xffff'0000)};
}

MOE_TARGET Words joined(const Pairs& v) {
  return rounded(canonical(v.even)) >> 16 | (rounded(canonical(v.odd)) & 0xffff'0000);
}

template <bool weighted, size_t vectors>
MOE_TARGET void sum_pairs(const Reduction& work, size_t token, size_t at, char* to) {
  Pairs sums[vectors] = {};
  int64_t first = work.starts[token], end = work.starts[token + 1];
  for (int64_t row = first; row < end; ++row) {
    auto* from = reinterpret_cast<const char*>(work.rows[row]) + 2 * at;
    for (size_t i = 0; i < vectors; ++i) {
      Pairs term = split(from + i * sizeof(Words));
      if constexpr (weighted) term = {term.even * work.weights[row], term.odd * work.weights[row]};
      sums[i] = row == first ? term : Pairs{sums[i].even + term.even, sums[i].odd + term.odd};
    }
  }
  if (work.scale)
    for (Pairs& sum : sums) sum = {sum.even * work.scale[token], sum.odd * work.scale[token]};
  for (size_t b = 0; b < work.bias_count; ++b) {
    auto* from = reinterpret_cast<const char*>(work.biases[b] + token * work.bias_stride) + 2 * at;
    for (size_t i = 0; i < vectors; ++i) {
      Pairs term = split(from + i * sizeof(Words));
      sums[i] = {sums[i].even + term.even, sums[i].odd + term.odd};
    }
  }
  for (size_t i = 0; i < vectors; ++i) store(to + i * sizeof(Words), joined(sums[i]));
}

template <bool weighted>
MOE_TARGET_FUNCTION void sum_token_bf16(const Reduction& work, size_t token) {
  bool other = work.out != Type::bf16 || (work.bias_count > 0 && work.bias != Type::bf16);
  if (other || work.starts[token] == work.starts[token + 1]) return sum_token<Type::bf16, weighted>(work, token);
  auto* to = reinterpret_cast<char*>(work.target + token * work.target_stride);
  constexpr size_t step = 2 * MOE_LANES;
  size_t at = 0;
  for (; at + kVectors * step <= work.hidden; at += kVectors * step)
    sum_pairs<weighted, kVectors>(work, token, at, to + 2 * at);
  for (; at + step <= work.hidden; at += step) sum_pairs<weighted, 1>(work, token, at, to + 2 * at);
  for (; at < work.hidden; ++at) sum_element<float>(work, token, at);
}

// By type of what comes in; then whether it is weighted.
constexpr SumToken kSums[][2] = {
    {sum_token<Type::f32, false>, sum_token<Type::f32, true>},
    {sum_token_bf16<false>, sum_token_bf16<true>},
    {sum_token<Type::f16, false>, sum_token<Type::f16, true>},
    {sum_token_f64, sum_token_f64},
};
