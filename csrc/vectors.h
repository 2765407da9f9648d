// Vectors as wide as the instruction set's registers: loads, stores, conversions and exp. Wider ones would be taken
// apart by the compiler, lane by lane where they are compared. For files that are compiled once for each instruction
// set: nothing here is shared between them.
#pragma once

#include <string.h>

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace gradret::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr std::int64_t kBlock = 4096;  // sums are made in float within a block, in double beyond
constexpr float kInfinity = __builtin_inff();

template <typename T, int kCount = kLanes>
struct Vector {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
using Floats = Vector<float>::type;
using Ints = Vector<std::int32_t>::type;
using Words = Vector<std::uint32_t>::type;
using Bytes = Vector<std::uint8_t>::type;
using Longs = Vector<std::int64_t, kLanes / 2>::type;  // of 64 bits: half as many
using HalfBytes = Vector<std::uint8_t, kLanes / 2>::type;

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename T>
inline void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

template <typename V, typename W>
inline V bits(W w) {
  static_assert(sizeof(V) == sizeof(W));
  V v;
  memcpy(&v, &w, sizeof v);
  return v;
}

inline Floats fill(float x) { return x - Floats{}; }

// Bytes to 32 and 64 bits and back. The compiler's own conversion takes such vectors apart lane by lane: right on
// every machine, but slow.
#if defined(__AVX512F__)
inline Ints widen(Bytes v) { return bits<Ints>(_mm512_cvtepu8_epi32(bits<__m128i>(v))); }
inline Bytes narrow(Ints v) { return bits<Bytes>(_mm512_cvtepi32_epi8(bits<__m512i>(v))); }
inline HalfBytes narrow(Longs v) {
  const __m128i bytes = _mm512_cvtepi64_epi8(bits<__m512i>(v));
  HalfBytes low;
  memcpy(&low, &bytes, sizeof low);
  return low;
}
inline Longs widen(HalfBytes v) {
  std::int64_t eight;
  memcpy(&eight, &v, sizeof eight);
  return bits<Longs>(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(eight)));
}
#else
#if defined(__AVX2__)
inline Ints widen(Bytes v) {
  std::int64_t eight;
  memcpy(&eight, &v, sizeof eight);
  return bits<Ints>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)));
}
#else
inline Ints widen(Bytes v) { return __builtin_convertvector(v, Ints); }
#endif
inline Bytes narrow(Ints v) { return __builtin_convertvector(v, Bytes); }
inline HalfBytes narrow(Longs v) { return __builtin_convertvector(v, HalfBytes); }
inline Longs widen(HalfBytes v) { return __builtin_convertvector(v, Longs); }
#endif

// Lanes where something holds, and what is done there only.
#if defined(__AVX512F__)
using Where = __mmask16;
inline Where equals(Bytes v, int x) {
  return _mm_cmpeq_epi8_mask(bits<__m128i>(v), _mm_set1_epi8(static_cast<char>(x)));
}
inline Where differs(Bytes v, int x) {
  return _mm_cmpneq_epi8_mask(bits<__m128i>(v), _mm_set1_epi8(static_cast<char>(x)));
}
inline Floats add_where(Where where, Floats sum, Floats x) {
  return bits<Floats>(_mm512_mask_add_ps(bits<__m512>(sum), where, bits<__m512>(sum), bits<__m512>(x)));
}
inline Floats larger_where(Where where, Floats top, Floats x) {  // NaN in x is left out
  return bits<Floats>(_mm512_mask_max_ps(bits<__m512>(top), where, bits<__m512>(x), bits<__m512>(top)));
}
inline Floats multiply_where(Where where, Floats x, Floats y) {  // 0 elsewhere
  return bits<Floats>(_mm512_maskz_mul_ps(where, bits<__m512>(x), bits<__m512>(y)));
}
#else
using Where = Ints;
inline Where equals(Bytes v, int x) { return widen(v) == x; }
inline Where differs(Bytes v, int x) { return widen(v) != x; }
inline Floats add_where(Where where, Floats sum, Floats x) { return sum + (where ? x : Floats{}); }
inline Floats larger_where(Where where, Floats top, Floats x) { return (where & (x > top)) ? x : top; }
inline Floats multiply_where(Where where, Floats x, Floats y) { return where ? x * y : Floats{}; }
#endif

// table[v] of 8 entries or, for kLevels == 0, of kMaxLevels; anything where v is kAbsent.
template <int kLevels>
inline Floats look_up(const float* table, Bytes v) {
#if defined(__AVX512F__)
  const __m512i at = bits<__m512i>(widen(v));
  const __m512 low = bits<__m512>(load<Floats>(table));
  if constexpr (kLevels > 0) return bits<Floats>(_mm512_permutexvar_ps(at, low));
  return bits<Floats>(_mm512_permutex2var_ps(low, at, bits<__m512>(load<Floats>(table + kLanes))));
#elif defined(__AVX2__)
  const __m256i at = bits<__m256i>(widen(v));
  if constexpr (kLevels > 0) return bits<Floats>(_mm256_permutevar8x32_ps(bits<__m256>(load<Floats>(table)), at));
  return bits<Floats>(_mm256_i32gather_ps(table, _mm256_and_si256(at, _mm256_set1_epi32(kMaxLevels - 1)), 4));
#else
  Floats x = {};
  if constexpr (kLevels > 0) {
    const Ints level = widen(v);
#pragma GCC unroll 8
    for (int l = 0; l < kLevels; l++) x = level == l ? fill(table[l]) : x;
  } else {
    for (int lane = 0; lane < kLanes; lane++) x[lane] = table[v[lane] % kMaxLevels];
  }
  return x;
#endif
}

// Calls body(values, position, lanes) for each vector of scores; the last one is filled up with -inf.
template <typename Body>
inline void each_vector(const float* from, std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(load<Floats>(from + i), i, kLanes);
  if (i < end) {
    Floats v = fill(-kInfinity);
    memcpy(&v, from + i, (end - i) * sizeof(float));
    body(v, i, static_cast<int>(end - i));
  }
}

// Levels of n documents, kAbsent beyond.
template <int kCount>
inline typename Vector<std::uint8_t, kCount>::type load_levels(const std::uint8_t* levels, std::int64_t n) {
  using Levels = typename Vector<std::uint8_t, kCount>::type;
  if (n == kCount) return load<Levels>(levels);
  std::uint8_t rest[kCount];
  memset(rest, kAbsent, sizeof rest);
  memcpy(rest, levels, n);
  return load<Levels>(rest);
}

// Whether a bit is set.
template <typename V>
inline bool any(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_test_epi8_mask(bits<__m512i>(v), bits<__m512i>(v)) != 0;
#endif
  std::uint32_t words[sizeof v / 4], found = 0;
  memcpy(words, &v, sizeof v);
  for (const std::uint32_t word : words) found |= word;
  return found != 0;
}

inline void store_lanes(float* to, Floats v, int lanes) {
  if (lanes == kLanes) return store(to, v);
  memcpy(to, &v, lanes * sizeof(float));
}

inline float highest(Floats v) {
  float top = v[0];
  for (int lane = 1; lane < kLanes; lane++) top = v[lane] > top ? v[lane] : top;
  return top;
}

inline double sum(Floats v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += v[lane];
  return total;
}

// exp(d / temperature) for d <= 0, to about two units in the last place. The multiple of temperature * ln 2 that is
// taken off d comes in two parts, the first of few bits, so that what is left is exact also far from 0.
struct Exponential {
  float per_octave, octave, octave_rest, lowest;

  // Whatever the temperature, a factor of 0 stays 0.
  static float finite(double x) {
    const double most = 3.4028234663852886e38;
    return static_cast<float>(x > most ? most : x < -most ? -most : x);
  }

  explicit Exponential(double temperature) {
    const double octave_exact = temperature * 0.6931471805599453;
    per_octave = finite(1 / octave_exact);
    const float rounded = finite(octave_exact);
    std::uint32_t word;
    memcpy(&word, &rounded, sizeof word);
    word &= 0xffffff00u;
    memcpy(&octave, &word, sizeof word);
    octave_rest = finite(octave_exact - octave);
    lowest = finite(-126 * octave_exact);  // below it: 0
  }

  inline Floats operator()(Floats d) const {
    const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats shifted = d * per_octave + magic;
    const Floats n = shifted - magic;
    const Floats f = ((d - n * octave) - n * octave_rest) * per_octave;
    // (2^f - 1) / f on [-.5, .5], from its values at Chebyshev nodes; relative error of 2^f 1e-8.
    Floats p = 1.54531634e-4f * f + 1.33908633e-3f;
    p = p * f + 9.61808302e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 0.240226507f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    // Times 2^n, or 0 below the lowest; NaN stays.
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask(bits<__m512>(d), _mm512_set1_ps(lowest), _CMP_NLT_UQ);
    return bits<Floats>(_mm512_maskz_scalef_ps(kept, bits<__m512>(p), bits<__m512>(n)));
#else
    const Words scale = (bits<Words>(shifted) << 23) + (127u << 23);
    return d < lowest ? Floats{} : p * bits<Floats>(scale);
#endif
  }
};

// log(1 + y) for y in [0, 1], to about two units in the last place.
inline Floats log_above_1(Floats y) {
  // log(1 + y) / y, from its values at Chebyshev nodes; relative error 5e-9.
  constexpr float kFactors[] = {-3.17605701e-3f, 1.95425265e-2f, -5.63736111e-2f, 0.105436236f,  -0.152696669f,
                                0.196632743f,    -0.249516159f,  0.333297104f,    -0.499998927f, 1.0f};
  Floats p = {};
#pragma GCC unroll 10
  for (const float factor : kFactors) p = p * y + factor;
  return p * y;
}

}  // namespace
}  // namespace gradret::cpu
