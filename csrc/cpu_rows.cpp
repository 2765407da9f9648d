// One row at a time, in vectors of 16 lanes; the compiler makes of them what the instruction set has. Compiled several
// times with other flags and another GRADRET_ISA, so nothing here may be an inline function that other files share: the
// linker could keep the copy that this processor can not run.

#include <math.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "core.h"
#include "cpu.h"

namespace gradret::cpu {
namespace {

constexpr int kLanes = 16;
constexpr std::int64_t kBlock = 4096;  // sums are made in float within a block, in double beyond
constexpr float kInfinity = __builtin_inff();

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Floats = Vector<float>::type;
using Ints = Vector<std::int32_t>::type;
using Longs = Vector<std::int64_t>::type;
using Words = Vector<std::uint32_t>::type;
using Halves = Vector<std::uint16_t>::type;
using Bytes = Vector<std::uint8_t>::type;

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

// Bytes and halves to 32 bits and back. The compiler's own conversion takes such vectors apart lane by lane.
#if defined(__AVX512F__)
inline Ints widen(Bytes v) { return bits<Ints>(_mm512_cvtepu8_epi32(bits<__m128i>(v))); }
inline Words widen(Halves v) { return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(v))); }
inline Halves narrow(Words v) { return bits<Halves>(_mm512_cvtepi32_epi16(bits<__m512i>(v))); }
inline Bytes narrow(Ints v) { return bits<Bytes>(_mm512_cvtepi32_epi8(bits<__m512i>(v))); }
inline Bytes narrow(Longs v) {
  __m512i parts[2];
  memcpy(parts, &v, sizeof v);
  return bits<Bytes>(_mm_unpacklo_epi64(_mm512_cvtepi64_epi8(parts[0]), _mm512_cvtepi64_epi8(parts[1])));
}
#else
#ifdef __AVX2__
inline Ints widen(Bytes v) {
  const __m128i low = bits<__m128i>(v);
  const __m256i parts[2] = {_mm256_cvtepu8_epi32(low), _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8))};
  return load<Ints>(parts);
}
inline Words widen(Halves v) {
  __m128i halves[2];
  memcpy(halves, &v, sizeof v);
  const __m256i parts[2] = {_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])};
  return load<Words>(parts);
}
#else
inline Ints widen(Bytes v) { return __builtin_convertvector(v, Ints); }
inline Words widen(Halves v) { return __builtin_convertvector(v, Words); }
#endif
inline Halves narrow(Words v) { return __builtin_convertvector(v, Halves); }
inline Bytes narrow(Ints v) { return __builtin_convertvector(v, Bytes); }
inline Bytes narrow(Longs v) { return __builtin_convertvector(v, Bytes); }
#endif

struct BFloat16 {
  std::uint16_t bits;
};

inline Floats load_floats(const float* from) { return load<Floats>(from); }
inline Floats load_floats(const BFloat16* from) {
  return bits<Floats>(widen(load<Halves>(from)) << 16);
}

inline void store_floats(float* to, Floats v) { store(to, v); }
inline void store_floats(BFloat16* to, Floats v) {
  const Words w = bits<Words>(v);
  const Words rounded = w + 0x7fff + ((w >> 16) & 1);  // to nearest, ties to even
  const Words chosen = v == v ? rounded : (w | 0x400000);
  store(to, narrow(chosen >> 16));
}

// Calls body(values, position, lanes) for each 16 of n scores; the last one is filled up with -inf.
template <typename T, typename Body>
inline void each_vector(const T* from, std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(load_floats(from + i), i, kLanes);
  if (i < end) {
    T rest[kLanes];
    memset(rest, 0, sizeof rest);
    memcpy(rest, from + i, (end - i) * sizeof(T));
    Floats v = load_floats(rest);
    for (int lane = end - i; lane < kLanes; lane++) v[lane] = -kInfinity;
    body(v, i, static_cast<int>(end - i));
  }
}

inline Ints load_levels(const std::uint8_t* levels, std::int64_t i, int lanes) {
  if (lanes == kLanes) return widen(load<Bytes>(levels + i));
  std::uint8_t rest[kLanes];
  memset(rest, kAbsent, sizeof rest);
  memcpy(rest, levels + i, lanes);
  return widen(load<Bytes>(rest));
}

template <typename T>
inline void store_lanes(T* to, Floats v, int lanes) {
  if (lanes == kLanes) return store_floats(to, v);
  T rest[kLanes];
  store_floats(rest, v);
  memcpy(to, rest, lanes * sizeof(T));
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
  float per_octave, octave, octave_rest;

  explicit Exponential(double temperature) {
    const double octave_exact = temperature * 0.6931471805599453;
    per_octave = static_cast<float>(1 / octave_exact);
    const float rounded = static_cast<float>(octave_exact);
    std::uint32_t word;
    memcpy(&word, &rounded, sizeof word);
    word &= 0xffffff00u;
    memcpy(&octave, &word, sizeof word);
    octave_rest = static_cast<float>(octave_exact - octave);
  }

  inline Floats operator()(Floats d) const {
    const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats x = d * per_octave;
    const Floats shifted = x + magic;
    const Floats n = shifted - magic;
    const Floats f = ((d - n * octave) - n * octave_rest) * per_octave;
    // (2^f - 1) / f on [-.5, .5], from its values at Chebyshev nodes; relative error of 2^f 1e-8.
    Floats p = 1.54531634e-4f * f + 1.33908633e-3f;
    p = p * f + 9.61808302e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 0.240226507f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    const Words scale = (bits<Words>(shifted) << 23) + (127u << 23);
    const Floats y = p * bits<Floats>(scale);
    return x < -126.0f ? Floats{} : y;  // NaN stays
  }
};

// The list's solution over `count` grades in ascending order: its loss, and in `potential` the centred potential c. P
// and Q are normalised masses; F, S: scratch, the masses up to and above a gap. Single-pass: the quantile functions are
// followed by pointers that only move forward.
double solve(int order, std::int64_t count, const double* v, const double* P, const double* Q, double tolerance,
             double* F, double* S, double* potential) {
  double above = 0;
  for (std::int64_t l = count; l-- > 0;) {
    S[l] = above;  // mass above level l
    above += P[l];
  }
  double total = 0;
  std::int64_t last = 0;  // the highest level with target mass, where quantiles end
  double q_total = 0;
  for (std::int64_t l = 0; l < count; l++) {
    if (Q[l] > 0) last = l;
    q_total += Q[l];
    F[l] = total += P[l];
  }
  double loss = 0, below = 0, G = 0, G_left = Q[0], G_right = Q[0];
  std::int64_t left = 0, right = 0;  // first levels where the target CDF is >= F, and > F
  for (std::int64_t l = 0; l + 1 < count; l++) {
    G += Q[l];
    const double gap = v[l + 1] - v[l];
    const double snapped = snap(F[l], G, tolerance);
    double t;
    if (order == 1) {
      const double difference = F[l] - G;
      loss += gap * (difference < 0 ? -difference : difference);
      t = slope1(gap, snapped, G);
    } else {
      while (left < last && G_left < snapped) G_left += Q[++left];
      while (right < last && G_right <= snapped) G_right += Q[++right];
      t = slope2(gap, (v[left] + v[right]) / 2, (v[l] + v[l + 1]) / 2);
    }
    potential[l] = t;
    below += t * F[l];
  }
  if (order == 2) {
    double u = 0, F_end = P[0], G_end = Q[0];
    std::int64_t i = 0, j = 0;
    while (true) {
      const double next = i == count - 1 ? (j >= last ? q_total : G_end) : (j >= last || F_end < G_end ? F_end : G_end);
      const double width = next - u, distance = v[i] - v[j];
      if (!(width <= 0)) loss += width * distance * distance;
      u = width > 0 ? next : u;
      if (i == count - 1 && j >= last) break;
      if (i < count - 1 && (j >= last || F_end <= G_end)) {
        F_end += P[++i];
      } else {
        G_end += Q[++j];
      }
    }
  }
  // c_l = sum of t S from l up, less sum of t F below l: no difference of large numbers when P has saturated.
  double up = 0;
  for (std::int64_t l = count; l-- > 0;) {
    if (l + 1 < count) {
      below -= potential[l] * F[l];
      up += potential[l] * S[l];
    }
    potential[l] = up - below;
  }
  return loss;
}

// Fills a row's gradient with zeros.
template <typename T>
inline void clear(const Lists& lists, std::int64_t row) {
  if (lists.gradient)
    memset(static_cast<T*>(lists.gradient) + row * lists.columns, 0, lists.columns * sizeof(T));
}

inline bool has_mass(const double* Q, std::int64_t count) {
  for (std::int64_t l = 0; l < count; l++)
    if (Q[l] != 0) return true;  // NaN is mass, so that it shows
  return false;
}

constexpr double kFloatTolerance = 8 * 1.1920928955078125e-7;
constexpr double kDoubleTolerance = 8 * 2.220446049250313e-16;

// Scores, levels and e = exp((s - top) / temperature) of one float32 or bfloat16 row.
template <typename T, int kLevels>  // kLevels: accumulators held in registers; 0 for a table
void sum_levels(const T* s, const std::uint8_t* levels, std::int64_t n, float top, const Exponential& exponential,
                float* e, double* M) {
  double tables[4][kMaxLevels + 1] = {};
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Floats sums[kLevels ? kLevels : 1] = {};
    each_vector(s, begin, end, [&](Floats x, std::int64_t i, int lanes) {
      const Ints level = load_levels(levels, i, lanes);
      const Floats y = exponential(level != kAbsent ? x - top : fill(-kInfinity));
      if (e) store_lanes(e + i, y, lanes);
      if constexpr (kLevels > 0) {
#pragma GCC unroll 8
        for (int l = 0; l < kLevels; l++) sums[l] += level == l ? y : Floats{};
      } else {
        // Four tables, so that neighbours of one level do not wait for each other.
        for (int lane = 0; lane < lanes; lane++)
          tables[lane & 3][level[lane] < kMaxLevels ? level[lane] : kMaxLevels] += y[lane];
      }
    });
    for (int l = 0; l < kLevels; l++) M[l] += sum(sums[l]);
  }
  if (!kLevels)
    for (int l = 0; l < kMaxLevels; l++) M[l] = tables[0][l] + tables[1][l] + tables[2][l] + tables[3][l];
}

template <typename T, int kLevels>
void scale_levels(const float* e, const std::uint8_t* levels, std::int64_t n, const float* C, T* gradient) {
  each_vector(e, 0, n, [&](Floats y, std::int64_t i, int lanes) {
    const Ints level = load_levels(levels, i, lanes);
    Floats c = {};
    if constexpr (kLevels > 0) {
#pragma GCC unroll 8
      for (int l = 0; l < kLevels; l++) c = level == l ? fill(C[l]) : c;
    } else {
      for (int lane = 0; lane < kLanes; lane++) c[lane] = C[level[lane] < kMaxLevels ? level[lane] : kMaxLevels];
    }
    y = level != kAbsent ? y : Floats{};
    store_lanes(gradient + i, y * c, lanes);
  });
}

// The highest of the row's present scores, 0 if there is none.
template <typename T>
float find_top(const T* s, const std::uint8_t* levels, std::int64_t n) {
  Floats top = fill(-kInfinity);
  each_vector(s, 0, n, [&](Floats x, std::int64_t i, int lanes) {
    if (levels) x = load_levels(levels, i, lanes) != kAbsent ? x : fill(-kInfinity);
    top = x > top ? x : top;
  });
  const float found = highest(top);
  return found == -kInfinity ? 0 : found;
}

template <typename T>
double level_row(const Lists& lists, std::int64_t row, float* work) {
  const std::int64_t n = lists.columns;
  const T* s = static_cast<const T*>(lists.scores) + row * lists.stride;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * n;
  const double* v = static_cast<const double*>(lists.values) + row * lists.width;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  const int count = lists.counts[row];
  const bool wants_gradient = lists.gradient != nullptr;
  double M[kMaxLevels + 1] = {}, F[kMaxLevels], S[kMaxLevels], c[kMaxLevels + 1] = {};
  if (!has_mass(Q, count)) return clear<T>(lists, row), 0.0;

  const float top = find_top(s, levels, n);
  const Exponential exponential(lists.temperature);
  float* e = wants_gradient ? work : nullptr;
  const auto add = count <= 4 ? sum_levels<T, 4> : count <= 8 ? sum_levels<T, 8> : sum_levels<T, 0>;
  add(s, levels, n, top, exponential, e, M);
  double Z = 0;
  for (int l = 0; l < count; l++) Z += M[l];
  if (Z == 0) return clear<T>(lists, row), 0.0;
  for (int l = 0; l < count; l++) M[l] /= Z;
  const double loss = solve(lists.order, count, v, M, Q, kFloatTolerance, F, S, c);
  if (wants_gradient) {
    float C[kMaxLevels + 1] = {};
    for (int l = 0; l < count; l++) C[l] = static_cast<float>(c[l] * lists.scale / (Z * lists.temperature));
    const auto scale = count <= 4 ? scale_levels<T, 4> : count <= 8 ? scale_levels<T, 8> : scale_levels<T, 0>;
    scale(e, levels, n, C, static_cast<T*>(lists.gradient) + row * n);
  }
  return loss;
}

template <>
double level_row<double>(const Lists& lists, std::int64_t row, float* work_) {
  double* e = reinterpret_cast<double*>(work_);
  const std::int64_t n = lists.columns;
  const double* s = static_cast<const double*>(lists.scores) + row * lists.stride;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * n;
  const double* v = static_cast<const double*>(lists.values) + row * lists.width;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  const int count = lists.counts[row];
  double M[kMaxLevels] = {}, F[kMaxLevels], S[kMaxLevels], c[kMaxLevels];
  if (!has_mass(Q, count)) return clear<double>(lists, row), 0.0;

  double top = -kInfinity, Z = 0;
  for (std::int64_t i = 0; i < n; i++)
    if (levels[i] != kAbsent && s[i] > top) top = s[i];
  if (top == -kInfinity) top = 0;
  for (std::int64_t i = 0; i < n; i++) {
    e[i] = levels[i] == kAbsent ? 0 : ::exp((s[i] - top) / lists.temperature);
    if (levels[i] != kAbsent) M[levels[i]] += e[i];
  }
  for (int l = 0; l < count; l++) Z += M[l];
  if (Z == 0) return clear<double>(lists, row), 0.0;
  for (int l = 0; l < count; l++) M[l] /= Z;
  const double loss = solve(lists.order, count, v, M, Q, kDoubleTolerance, F, S, c);
  if (lists.gradient) {
    double* gradient = static_cast<double*>(lists.gradient) + row * n;
    for (std::int64_t i = 0; i < n; i++)
      gradient[i] = levels[i] == kAbsent ? 0 : e[i] / Z * c[levels[i]] * lists.scale / lists.temperature;
  }
  return loss;
}

// e[0..count) = exp((x - top) / temperature) of scores already in order.
inline void exponentials(double temperature, std::int64_t count, float* e) {
  const float top = find_top(e, nullptr, count);
  const Exponential exponential(temperature);
  each_vector(e, 0, count, [&](Floats x, std::int64_t i, int lanes) {
    store_lanes(e + i, exponential(x - top), lanes);
  });
}
inline void exponentials(double temperature, std::int64_t count, double* e) {
  double top = -kInfinity;
  for (std::int64_t i = 0; i < count; i++) top = e[i] > top ? e[i] : top;
  if (top == -kInfinity) top = 0;
  for (std::int64_t i = 0; i < count; i++) e[i] = ::exp((e[i] - top) / temperature);
}

inline float to_wide(float x) { return x; }
inline double to_wide(double x) { return x; }
inline float to_wide(BFloat16 x) {
  const std::uint32_t word = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &word, sizeof y);
  return y;
}
inline void from_wide(double x, float* to) { *to = static_cast<float>(x); }
inline void from_wide(double x, double* to) { *to = x; }
inline void from_wide(double x, BFloat16* to) {
  BFloat16 rounded[kLanes];
  store_floats(rounded, fill(static_cast<float>(x)));
  *to = rounded[0];
}

template <typename T, typename E>
double sorted_row(const Lists& lists, std::int64_t row, E* e, double* tables) {
  const std::int64_t n = lists.columns, count = lists.counts[row];
  const T* s = static_cast<const T*>(lists.scores) + row * lists.stride;
  const std::int32_t* order = static_cast<const std::int32_t*>(lists.index) + row * n;
  const double* v = static_cast<const double*>(lists.values) + row * n;
  const double* Q = static_cast<const double*>(lists.mass) + row * n;
  double *P = tables, *F = P + n, *S = F + n, *c = S + n;
  clear<T>(lists, row);
  if (!has_mass(Q, count)) return 0;

  for (std::int64_t i = 0; i < count; i++) e[i] = to_wide(s[order[i]]);
  exponentials(lists.temperature, count, e);
  double Z = 0;
  for (std::int64_t i = 0; i < count; i++) Z += e[i];
  if (Z == 0) return 0;
  for (std::int64_t i = 0; i < count; i++) P[i] = e[i] / Z;
  const double tolerance = sizeof(E) == sizeof(double) ? kDoubleTolerance : kFloatTolerance;
  const double loss = solve(lists.order, count, v, P, Q, tolerance, F, S, c);
  if (lists.gradient) {
    T* gradient = static_cast<T*>(lists.gradient) + row * n;
    for (std::int64_t i = 0; i < count; i++)
      from_wide(P[i] * c[i] * lists.scale / lists.temperature, gradient + order[i]);
  }
  return loss;
}

double any_level_row(const Lists& lists, std::int64_t row, void* work) {
  float* e = static_cast<float*>(work);
  switch (lists.scalar) {
    case Scalar::kFloat64: return level_row<double>(lists, row, e);
    case Scalar::kBFloat16: return level_row<BFloat16>(lists, row, e);
    default: return level_row<float>(lists, row, e);
  }
}

double any_sorted_row(const Lists& lists, std::int64_t row, void* work, double* tables) {
  switch (lists.scalar) {
    case Scalar::kFloat64: return sorted_row<double>(lists, row, static_cast<double*>(work), tables);
    case Scalar::kBFloat16: return sorted_row<BFloat16>(lists, row, static_cast<float*>(work), tables);
    default: return sorted_row<float>(lists, row, static_cast<float*>(work), tables);
  }
}

// Distinct grades of one row without a sort: chunks are compared with the grades known so far, and looked at one by one
// only where something new turns up.
template <typename T>
bool prepare_row(const Grades& all, std::int64_t row, std::uint8_t* levels) {
  using Values = typename Vector<T>::type;
  using Mask = decltype(Values{} == Values{});
  constexpr std::int64_t kChunk = 16 * kLanes;
  const std::int64_t n = all.columns;
  const T* y = static_cast<const T*>(all.grades) + row * n;
  const std::uint8_t* mask = all.mask ? all.mask + row * n : nullptr;
  T known[kMaxLevels] = {};
  int count = 0;
  bool nan = false;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    if (count && !mask && end - begin == kChunk) {
      Mask missing = {};
      for (std::int64_t i = begin; i < end; i += kLanes) {
        const Values g = load<Values>(y + i);
        Mask found = {};
        for (int l = 0; l < count; l++) found |= g == known[l];
        missing |= ~found;
      }
      bool any = false;
      for (int lane = 0; lane < kLanes; lane++) any |= missing[lane] != 0;
      if (!any) continue;
    }
    for (std::int64_t i = begin; i < end; i++) {
      if (mask && !mask[i]) continue;
      int l = 0;
      while (l < count && y[i] != known[l]) l++;
      if (l < count) continue;
      if (y[i] != y[i]) {
        nan = true;
        continue;
      }
      if (count == kMaxLevels) return false;
      for (l = count++; l > 0 && known[l - 1] > y[i]; l--) known[l] = known[l - 1];
      known[l] = y[i];
    }
  }
  std::uint8_t* ids = levels + row * n;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Values g = load<Values>(y + i);
    Mask level = {};
    for (int l = 0; l + 1 < count; l++) level -= g > known[l];
    store(ids + i, narrow(level));
  }
  for (; i < n; i++) {
    int level = 0;
    for (int l = 0; l + 1 < count; l++) level += y[i] > known[l];
    ids[i] = static_cast<std::uint8_t>(level);
  }
  if (mask)
    for (i = 0; i < n; i++) ids[i] = mask[i] ? ids[i] : kAbsent;

  double* v = all.values + row * kMaxLevels;
  double* mass = all.mass + row * kMaxLevels;
  for (int l = 0; l < kMaxLevels; l++) v[l] = count ? static_cast<double>(known[l < count ? l : count - 1]) : 0;
  for (int l = 0; l < kMaxLevels; l++) mass[l] = 0;
  if (all.targets == Targets::kWeights) {
    const double* w = all.weights + row * n;
    for (i = 0; i < n; i++)
      if (ids[i] != kAbsent) mass[ids[i]] += w[i];
  } else {
    for (int l = 0; l < count; l++) {
      std::int64_t number = 0;
      for (i = 0; i < n; i++) number += ids[i] == l;
      mass[l] = static_cast<double>(number);
    }
  }
  if (nan) {  // a grade that is no number makes the list's loss no number
    count = count ? count : 1;
    v[0] = __builtin_nan("");
  }
  all.counts[row] = count;
  finish_mass(all.targets, count, v, mass);
  return true;
}

bool any_prepare_row(const Grades& all, std::int64_t row, std::uint8_t* levels) {
  switch (all.grade) {
    case Grade::kFloat32: return prepare_row<float>(all, row, levels);
    case Grade::kFloat64: return prepare_row<double>(all, row, levels);
    default: return prepare_row<std::int64_t>(all, row, levels);
  }
}

// Calls body(score, value) for each pair of the row that lies in the tile.
template <typename Body>
inline void each_pair(const Tile& tile, std::int64_t row, Body body) {
  const std::int32_t* columns = tile.pair_columns;
  std::int64_t i = tile.pair_offsets[row];
  const std::int64_t end = tile.pair_offsets[row + 1];
  for (std::int64_t span = end - i; span > 0;) {  // the first column of the tile or beyond it
    const std::int64_t half = span / 2;
    if (columns[i + half] < tile.first_column) {
      i += half + 1;
      span -= half + 1;
    } else {
      span = half;
    }
  }
  float* s = tile.scores + row * tile.stride - tile.first_column;
  for (; i < end && columns[i] < tile.first_column + tile.columns; i++) body(s[columns[i]], tile.pair_values[i]);
}

void fold_row(const Tile& tile, std::int64_t row) {
  float* s = tile.scores + row * tile.stride;
  each_pair(tile, row, [](float& score, float& value) {
    value = score;
    score = -kInfinity;
  });
  Floats tops = fill(tile.top[row]);
  each_vector(s, 0, tile.columns, [&](Floats x, std::int64_t, int) { tops = x > tops ? x : tops; });
  const float top = highest(tops), base = top == -kInfinity ? 0 : top;
  const Exponential exponential(tile.temperature);
  Floats sums = {};
  each_vector(s, 0, tile.columns, [&](Floats x, std::int64_t, int) { sums += exponential(x - base); });
  const float before = tile.sum[row] == 0 ? 0 : tile.sum[row] * exponential(fill(tile.top[row] - base))[0];
  tile.top[row] = top;
  tile.sum[row] = static_cast<float>(before + sum(sums));
}

void unfold_row(const Tile& tile, std::int64_t row) {
  float* s = tile.scores + row * tile.stride;
  const float weight = tile.sum[row] == 0 ? 0 : tile.weight[row] / tile.sum[row], top = tile.top[row];
  const Exponential exponential(tile.temperature);
  if (weight == 0) {
    memset(s, 0, tile.columns * sizeof(float));
  } else {
    each_vector(s, 0, tile.columns, [&](Floats x, std::int64_t i, int lanes) {
      const Floats d = x - top;  // recomputed scores may be a rounding above the top
      store_lanes(s + i, weight * exponential(d > 0.0f ? Floats{} : d), lanes);
    });
  }
  each_pair(tile, row, [](float& score, float& value) { score = value; });
}

}  // namespace

extern const Rows GRADRET_ISA;
const Rows GRADRET_ISA = {GRADRET_ISA_NAME, any_level_row, any_sorted_row, any_prepare_row, fold_row, unfold_row};

}  // namespace gradret::cpu
