// One row at a time: loss and gradient, the preparation of grade levels, and the tiles of fused scoring. Compiled several
// times with other flags and another GRADRET_ISA, so nothing here may be an inline function that other files share: the
// linker could keep the copy that this processor cannot run.

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

namespace gradret::cpu {
namespace {

// Loss and gradient.

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

// A list's solution over `count` grades in ascending order: its loss, and in `potential` the centred potential c. P
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
  const double check = total + q_total;  // gaps of 0 and comparisons hide what is no number
  if (check != check) {
    for (std::int64_t l = 0; l < count; l++) potential[l] = check;
    return check;
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

// A row whose documents are taken one by one: in the sorted form, where each is a level of its own, and of float64 in
// either form. E: the type of exponentials. Absent documents have none; in the sorted form they come last.
template <typename T, typename E>
double scattered_row(const Lists& lists, std::int64_t row, E* e, double* tables) {
  const std::int64_t n = lists.columns, count = lists.counts[row], documents = lists.sorted ? count : n;
  const T* s = static_cast<const T*>(lists.scores) + row * lists.stride;
  const std::int32_t* order = static_cast<const std::int32_t*>(lists.index) + row * n;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * n;
  const double* v = static_cast<const double*>(lists.values) + row * lists.width;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  double *P = tables, *F = P + count, *S = F + count, *c = S + count;
  clear<T>(lists, row);
  if (!has_mass(Q, count)) return 0;

  const auto absent = [&](std::int64_t i) { return !lists.sorted && levels[i] == kAbsent; };
  const auto level = [&](std::int64_t i) { return lists.sorted ? i : levels[i]; };
  const auto place = [&](std::int64_t i) { return lists.sorted ? order[i] : i; };
  for (std::int64_t i = 0; i < documents; i++) e[i] = absent(i) ? -kInfinity : to_wide(s[place(i)]);
  exponentials(lists.temperature, documents, e);
  memset(P, 0, count * sizeof(double));
  for (std::int64_t i = 0; i < documents; i++)
    if (!absent(i)) P[level(i)] += e[i];
  double Z = 0;
  for (std::int64_t l = 0; l < count; l++) Z += P[l];
  if (Z == 0) return 0;
  for (std::int64_t l = 0; l < count; l++) P[l] /= Z;
  const double tolerance = sizeof(E) == sizeof(double) ? double_tolerance(n) : kFloatTolerance;
  const double loss = solve(lists.order, count, v, P, Q, tolerance, F, S, c);
  if (lists.gradient) {
    T* gradient = static_cast<T*>(lists.gradient) + row * n;
    const double factor = lists.scale / (Z * lists.temperature);
    for (std::int64_t i = 0; i < documents; i++)
      if (!absent(i)) from_wide(e[i] * c[level(i)] * factor, gradient + place(i));
  }
  return loss;
}

double transport_row(const Lists& lists, std::int64_t row, void* work, double* tables) {
  float* e = static_cast<float*>(work);
  switch (lists.scalar) {
    case Scalar::kFloat64:
      return scattered_row<double>(lists, row, static_cast<double*>(work), tables);
    case Scalar::kBFloat16:
      return lists.sorted ? scattered_row<BFloat16>(lists, row, e, tables) : level_row<BFloat16>(lists, row, e);
    default:
      return lists.sorted ? scattered_row<float>(lists, row, e, tables) : level_row<float>(lists, row, e);
  }
}

// Grade levels without a sort: a row is compared with the grades known so far, and looked at one by one only where
// something new turns up.

constexpr std::int64_t kChunk = 256;

template <typename T>
struct Known {
  int count;
  T grade[kMaxLevels];

  // Takes in the grades of y[begin, end). False if they are too many; `nan` is set when one is no number.
  bool add(const T* y, const std::uint8_t* mask, std::int64_t begin, std::int64_t end, bool& nan) {
    for (std::int64_t i = begin; i < end; i++) {
      if (mask && !mask[i]) continue;
      int l = 0;
      while (l < count && y[i] != grade[l]) l++;
      if (l < count) continue;
      if (y[i] != y[i]) {
        nan = true;
        continue;
      }
      if (count == kMaxLevels) return false;
      for (l = count++; l > 0 && grade[l - 1] > y[i]; l--) grade[l] = grade[l - 1];
      grade[l] = y[i];
    }
    return true;
  }
};

// Integers as wide as a grade.
template <int kBytes>
struct SameSize {
  using type = Ints;
};
template <>
struct SameSize<8> {
  using type = Longs;
};

// Writes the levels of a row, and how many of its documents are above each of the first kLevels known grades. Returns
// the length of the row, or the begin of the first chunk that holds an unknown grade.
template <typename T, int kLevels>
std::int64_t assign_levels(const T* y, const std::uint8_t* mask, std::int64_t n, const Known<T>& known,
                           std::uint8_t* levels, std::int64_t* above, std::int64_t& present) {
  constexpr int kCount = kLanes * 4 / sizeof(T);
  using Values = typename Vector<T, kCount>::type;
  using Mask = typename SameSize<sizeof(T)>::type;
  using Existing = typename Vector<std::uint8_t, kCount>::type;
  T grade[kLevels];
  for (int l = 0; l < kLevels; l++) grade[l] = known.grade[l < known.count ? l : known.count - 1];
  Mask higher[kLevels] = {}, there = {};
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    Mask missing = {};
    for (std::int64_t i = begin; i < end; i += kCount) {
      const std::int64_t lanes = end - i < kCount ? end - i : kCount;
      Values g = {};
      Existing exists = {};
      if (lanes == kCount) {
        g = load<Values>(y + i);
        exists = mask ? load<Existing>(mask + i) : ~Existing{};
      } else {
        for (int lane = 0; lane < lanes; lane++) g[lane] = y[i + lane];
        for (int lane = 0; lane < lanes; lane++) exists[lane] = mask ? mask[i + lane] : 1;
      }
      const Mask valid = bits<Mask>(widen(exists) != 0);
      Mask found = {}, level = {};
#pragma GCC unroll 8
      for (int l = 0; l < kLevels; l++) {
        const Mask over = bits<Mask>(g > grade[l]) & valid;
        found |= bits<Mask>(g == grade[l]);
        higher[l] -= over;
        if (l + 1 < kLevels) level -= over;
      }
      missing |= ~found & valid;
      there -= valid;
      const Existing ids = narrow(valid ? level : Mask{} + kAbsent);
      if (lanes == kCount) {
        store(levels + i, ids);
      } else {
        for (int lane = 0; lane < lanes; lane++) levels[i + lane] = ids[lane];
      }
    }
    for (int lane = 0; lane < kCount; lane++)
      if (missing[lane]) return begin;
  }
  present = 0;
  for (int lane = 0; lane < kCount; lane++) present += there[lane];
  for (int l = 0; l < kLevels; l++) {
    above[l] = 0;
    for (int lane = 0; lane < kCount; lane++) above[l] += higher[l][lane];
  }
  return n;
}

template <typename T>
bool prepare_row(const Grades& all, std::int64_t row, LevelTable& table) {
  const std::int64_t n = all.columns;
  const T* y = static_cast<const T*>(all.grades) + row * n;
  const std::uint8_t* mask = all.mask ? all.mask + row * n : nullptr;
  std::uint8_t* ids = static_cast<std::uint8_t*>(all.index) + row * n;
  double* v = all.values + row * kMaxLevels;
  double* mass = all.mass + row * kMaxLevels;

  // Lists of a batch mostly share their grades: begin with those of the list before. What this list lacks of them is
  // taken out again, so that nothing of a list's result comes from another.
  static_assert(sizeof(Known<T>) <= sizeof(LevelTable));
  Known<T> known;
  memcpy(&known, &table, sizeof known);
  bool seeded = known.count > 0, look = !seeded, nan = false;
  std::int64_t above[kMaxLevels] = {}, present = 0, end = 0;
  while (true) {
    if (look) {
      if (!known.add(y, mask, end, end + kChunk < n ? end + kChunk : n, nan)) {
        if (!seeded) return false;
        seeded = false;
        known.count = 0;
        end = 0;
        continue;
      }
    }
    if (nan) break;
    if (!known.count) {  // nothing but absent documents so far
      end += kChunk;
      if (end >= n) break;
      continue;
    }
    const auto assign = known.count <= 4   ? assign_levels<T, 4>
                        : known.count <= 8 ? assign_levels<T, 8>
                                           : assign_levels<T, kMaxLevels>;
    end = assign(y, mask, n, known, ids, above, present);
    if (end >= n) break;
    look = true;
  }

  std::int64_t number[kMaxLevels] = {};
  std::uint8_t own[256];  // the level, counting this list's only
  int count = 0;
  memset(own, kAbsent, sizeof own);
  for (int l = 0; l < kMaxLevels; l++) v[l] = mass[l] = 0;
  if (nan) {  // a grade that is no number makes the list's loss no number
    memset(ids, 0, n);
    v[0] = v[1] = mass[0] = __builtin_nan("");
    all.counts[row] = 2;
    return true;
  }
  for (int l = 0; l < known.count; l++) {
    const std::int64_t found = (l ? above[l - 1] : present) - (l + 1 < known.count ? above[l] : 0);
    if (!found) continue;
    number[count] = found;
    v[count] = static_cast<double>(known.grade[l]);
    own[l] = static_cast<std::uint8_t>(count++);
  }
  all.counts[row] = count;
  if (!count) {
    memset(ids, kAbsent, n);
    return true;
  }
  if (count < known.count)
    for (std::int64_t i = 0; i < n; i++) ids[i] = own[ids[i]];
  if (known.count <= 8) memcpy(&table, &known, sizeof known);
  for (int l = count; l < kMaxLevels; l++) v[l] = v[count - 1];
  if (all.targets == Targets::kWeights) {
    const double* w = all.weights + row * n;
    for (std::int64_t i = 0; i < n; i++)
      if (ids[i] != kAbsent) mass[ids[i]] += w[i];
  } else {
    for (int l = 0; l < count; l++) mass[l] = static_cast<double>(number[l]);
  }
  finish_mass(all.targets, count, v, mass);
  return true;
}

bool prepare_any_row(const Grades& all, std::int64_t row, LevelTable& table) {
  switch (all.grade) {
    case Grade::kFloat32:
      return prepare_row<float>(all, row, table);
    case Grade::kFloat64:
      return prepare_row<double>(all, row, table);
    default:
      return prepare_row<std::int64_t>(all, row, table);
  }
}

// The tiles of fused scoring.

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
const Rows GRADRET_ISA = {GRADRET_ISA_NAME, transport_row, prepare_any_row, fold_row, unfold_row};

}  // namespace gradret::cpu
