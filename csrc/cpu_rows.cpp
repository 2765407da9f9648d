// One row at a time. Compiled several times with other flags and another GRADRET_ISA, so nothing here may be an inline
// function that other files share: the linker could keep the copy that this processor can not run.

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "grades.h"
#include "solve.h"
#include "vectors.h"

namespace gradret::cpu {
namespace {

// Fills a row's gradient with zeros.
template <typename T>
inline void clear(const Lists& lists, std::int64_t row) {
  if (lists.gradient) memset(static_cast<T*>(lists.gradient) + row * lists.columns, 0, lists.columns * sizeof(T));
}

inline bool has_mass(const double* Q, std::int64_t count) {
  for (std::int64_t l = 0; l < count; l++)
    if (Q[l] != 0) return true;  // NaN is mass, so that it shows
  return false;
}

// Float exponentials are off by about two units in the last place, their sums, in double, by no more. Sums of n terms
// in double are off by up to n units.
constexpr double kFloatTolerance = 3 * 1.1920928955078125e-7;
inline double double_tolerance(std::int64_t n) { return (8 + n / 8) * 2.220446049250313e-16; }

// Scores, levels and e = exp((s - top) / temperature) of one float32 or bfloat16 row.
template <typename T, int kLevels>  // kLevels: accumulators held in registers; 0 for a table
void sum_levels(const T* s, const std::uint8_t* levels, std::int64_t n, float top, const Exponential& exponential,
                float* e, double* M) {
  double tables[4][kMaxLevels + 1] = {};
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Floats sums[kLevels ? kLevels : 1] = {};
    each_vector(s, begin, end, [&](Floats x, std::int64_t i, int lanes) {
      const Bytes level = load_levels(levels, i, lanes);
      const Floats y = exponential(x - top);  // of absent documents anything
      if (e) store_lanes(e + i, y, lanes);
      if constexpr (kLevels > 0) {
#pragma GCC unroll 8
        for (int l = 0; l < kLevels; l++) sums[l] = add_where(equals(level, l), sums[l], y);
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
    const Bytes level = load_levels(levels, i, lanes);
    store_lanes(gradient + i, multiply_where(differs(level, kAbsent), y, look_up<kLevels>(C, level)), lanes);
  });
}

// The highest of the row's present scores, 0 if there is none.
template <typename T>
float find_top(const T* s, const std::uint8_t* levels, std::int64_t n) {
  Floats top = fill(-kInfinity);
  each_vector(s, 0, n, [&](Floats x, std::int64_t i, int lanes) {
    top = levels ? larger_where(differs(load_levels(levels, i, lanes), kAbsent), top, x) : (x > top ? x : top);
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
    float C[kMaxLevels] = {};
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
  const double loss = solve(lists.order, count, v, M, Q, double_tolerance(n), F, S, c);
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
  each_vector(e, 0, count,
              [&](Floats x, std::int64_t i, int lanes) { store_lanes(e + i, exponential(x - top), lanes); });
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
  const double tolerance = sizeof(E) == sizeof(double) ? double_tolerance(n) : kFloatTolerance;
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
    case Scalar::kFloat64:
      return level_row<double>(lists, row, e);
    case Scalar::kBFloat16:
      return level_row<BFloat16>(lists, row, e);
    default:
      return level_row<float>(lists, row, e);
  }
}

double any_sorted_row(const Lists& lists, std::int64_t row, void* work, double* tables) {
  switch (lists.scalar) {
    case Scalar::kFloat64:
      return sorted_row<double>(lists, row, static_cast<double*>(work), tables);
    case Scalar::kBFloat16:
      return sorted_row<BFloat16>(lists, row, static_cast<float*>(work), tables);
    default:
      return sorted_row<float>(lists, row, static_cast<float*>(work), tables);
  }
}

bool any_prepare_row(const Grades& all, std::int64_t row, std::uint8_t* levels, LevelTable& table) {
  switch (all.grade) {
    case Grade::kFloat32:
      return prepare_row<float>(all, row, levels, table);
    case Grade::kFloat64:
      return prepare_row<double>(all, row, levels, table);
    default:
      return prepare_row<std::int64_t>(all, row, levels, table);
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
  double sum_of_tile = 0;
  for (std::int64_t begin = 0; begin < tile.columns; begin += kBlock) {
    Floats sums = {};
    const std::int64_t end = begin + kBlock < tile.columns ? begin + kBlock : tile.columns;
    each_vector(s, begin, end, [&](Floats x, std::int64_t, int) { sums += exponential(x - base); });
    sum_of_tile += sum(sums);
  }
  const double before = tile.sum[row] == 0 ? 0 : tile.sum[row] * exponential(fill(tile.top[row] - base))[0];
  tile.top[row] = top;
  tile.sum[row] = before + sum_of_tile;
}

void unfold_row(const Tile& tile, std::int64_t row) {
  float* s = tile.scores + row * tile.stride;
  const float weight = tile.sum[row] == 0 ? 0 : static_cast<float>(tile.weight[row] / tile.sum[row]);
  const float top = tile.top[row];
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
