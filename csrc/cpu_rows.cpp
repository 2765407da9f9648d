// One row at a time: loss and gradient, the preparation of grade levels, and the tiles of fused scoring. Compiled
// several times with other flags and another GRADRET_ISA, so nothing here may be an inline function that other files
// share: the linker could keep the copy that this processor cannot run.

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

inline double add(const double* x, std::int64_t count) {
  double total = 0;
  for (std::int64_t l = 0; l < count; l++) total += x[l];
  return total;
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

// From sums of exponentials, P, to the loss of the transport and, in c, each level's factor of its documents'
// exponentials in the gradient, but for what contrast adds. Z: all of P.
double solve_terms(const Lists& lists, std::int64_t row, double Z, double cross, double tolerance, double* P, double* F,
                   double* S, double* c) {
  const std::int64_t count = lists.counts[row];
  const double* v = static_cast<const double*>(lists.values) + row * lists.width;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  const double check = Z + add(Q, count);  // gaps of 0 and comparisons hide what is no number
  double loss = check != check ? check : 0;
  memset(c, 0, count * sizeof(double));
  if (lists.transport != 0 && loss == 0) {
    for (std::int64_t l = 0; l < count; l++) P[l] /= Z;
    loss = lists.transport * solve(lists.order, count, v, P, Q, tolerance, F, S, c);
  }
  for (std::int64_t l = 0; l < count; l++)
    c[l] = (loss != loss ? loss : lists.transport * c[l] + cross) * lists.scale / (Z * lists.temperature);
  return loss;
}

// Scores, levels and e = exp((s - top) / temperature) of one row.
template <int kLevels>  // accumulators held in registers; 0 for a table
void sum_levels(const float* s, const std::uint8_t* levels, std::int64_t n, float top, const Exponential& exponential,
                float* e, double* M) {
  double tables[4][kMaxLevels + 1] = {};
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Floats sums[kLevels ? kLevels : 1] = {};
    each_vector(s, begin, end, [&](Floats x, std::int64_t i, int lanes) {
      const Bytes level = load_levels<kLanes>(levels + i, lanes);
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

// Turns exponentials into the gradient.
template <int kLevels>
void scale_levels(float* e, const std::uint8_t* levels, std::int64_t n, const float* C) {
  each_vector(e, 0, n, [&](Floats y, std::int64_t i, int lanes) {
    const Bytes level = load_levels<kLanes>(levels + i, lanes);
    store_lanes(e + i, multiply_where(differs(level, kAbsent), y, look_up<kLevels>(C, level)), lanes);
  });
}

// The highest of the row's present scores, 0 if there is none.
float find_top(const float* s, const std::uint8_t* levels, std::int64_t n) {
  Floats top = fill(-kInfinity);
  each_vector(s, 0, n, [&](Floats x, std::int64_t i, int lanes) {
    top = larger_where(differs(load_levels<kLanes>(levels + i, lanes), kAbsent), top, x);
  });
  const float found = highest(top);
  return found == -kInfinity ? 0 : found;
}

constexpr std::int64_t kStep = 64;

// Whether one of up to kCount documents is of a level from low to high; few are, in a list among those of others.
template <int kCount>
inline bool has_level(const std::uint8_t* levels, std::int64_t n, int low, int high) {
  const auto span = static_cast<std::uint8_t>(high - low);
  const auto found = load_levels<kCount>(levels, n) - static_cast<std::uint8_t>(low) <= span;
  return any(bits<typename Vector<std::uint8_t, kCount>::type>(found));
}

// Sums over the documents with target mass, each times its mass: of the scores above `top`, of the contrast's terms,
// and of each level's slopes s_i. lowest: of their scores.
struct Pull {
  double score = 0, opposed = 0, slopes[kMaxLevels] = {};
  float lowest = kInfinity;
};

// Takes these sums, and turns the exponentials e of those documents, unless null, into their gradient, e * C - share *
// (cross + contrast * s_i). rivals: by level, the log-sum-exp of the documents below it above `top`, in units of score.
template <int kLevels>
Pull pull_levels(const Lists& lists, std::int64_t row, const float* C, float top, const float* rivals, float* e) {
  const float* s = static_cast<const float*>(lists.scores) + row * lists.stride;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * lists.columns;
  const double* w = static_cast<const double*>(lists.share) + row * lists.width;
  const Exponential exponential(lists.temperature);
  const double factor = lists.scale / lists.temperature;
  const float cross = static_cast<float>(lists.cross * factor), contrast = static_cast<float>(lists.contrast * factor);
  const float per_score = Exponential::finite(1 / lists.temperature);
  float share[kMaxLevels] = {};
  int low = 0, high = lists.counts[row] - 1;  // the levels with target mass lie between
  while (low < high && w[low] == 0) low++;
  while (high > low && w[high] == 0) high--;
  for (int l = low; l <= high; l++) share[l] = static_cast<float>(w[l]);
  Pull pull;
  Floats lowest = fill(kInfinity), scores = {}, terms = {}, slopes[kLevels ? kLevels : 1] = {};
  const auto add = [&](Floats x, std::int64_t i, int lanes) {
    if (!has_level<kLanes>(levels + i, lanes, low, high)) return;
    const Bytes level = load_levels<kLanes>(levels + i, lanes);
    const Floats q = multiply_where(differs(level, kAbsent), look_up<kLevels>(share, level), fill(1));
    lowest = q > 0.0f && x < lowest ? x : lowest;
    const Floats above = q > 0.0f ? x - top : Floats{}, d = above - look_up<kLevels>(rivals, level);
    const Floats y = exponential(d > 0.0f ? -d : d);
    const Floats slope = (d > 0.0f ? y : fill(1)) / (y + 1.0f);
    scores += q * above;
    if constexpr (kLevels > 0) {
#pragma GCC unroll 8
      for (int l = 0; l < kLevels; l++) slopes[l] = add_where(equals(level, l), slopes[l], q * slope);
    } else {
      for (int lane = 0; lane < lanes; lane++)
        if (q[lane] > 0) pull.slopes[level[lane]] += q[lane] * slope[lane];
    }
    terms += q * ((d > 0.0f ? Floats{} : -d) * per_score + log_above_1(y));
    if (!e) return;
    Floats exponentials = {};
    memcpy(&exponentials, e + i, lanes * sizeof(float));
    const Floats gradient = exponentials * look_up<kLevels>(C, level) - q * (slope * contrast + cross);
    store_lanes(e + i, q > 0.0f ? gradient : exponentials, lanes);
  };
  for (std::int64_t begin = 0; begin < lists.columns; begin += kStep) {
    const std::int64_t end = begin + kStep < lists.columns ? begin + kStep : lists.columns;
    if (has_level<kStep>(levels + begin, end - begin, low, high)) each_vector(s, begin, end, add);
    if (end < lists.columns && end % kBlock) continue;
    pull.score += sum(scores);
    pull.opposed += sum(terms);
    scores = terms = Floats{};
    for (int l = 0; l < kLevels; l++) {
      pull.slopes[l] += sum(slopes[l]);
      slopes[l] = Floats{};
    }
  }
  pull.lowest = -highest(-lowest);
  return pull;
}

template <typename T>
double scattered_row(const Lists& lists, std::int64_t row, double* scratch);

// The logarithm of a sum of terms factor * e^x.
class Logarithms {
 public:
  void add(double x, double factor) {
    if (x > top_) {
      sum_ = top_ == -kInfinity ? 0 : sum_ * ::exp(top_ - x);
      top_ = x;
    }
    if (x != -kInfinity) sum_ += factor * ::exp(x - top_);
  }
  double value() const { return top_ + ::log(sum_); }  // -inf of nothing

 private:
  double top_ = -kInfinity, sum_ = 0;
};

// A row of float32 scores in the level form.
double level_row(const Lists& lists, std::int64_t row, double* scratch) {
  const std::int64_t n = lists.columns;
  const float* s = static_cast<const float*>(lists.scores) + row * lists.stride;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * n;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  const double* w = static_cast<const double*>(lists.share) + row * lists.width;
  const int count = lists.counts[row];
  double M[kMaxLevels + 1] = {}, F[kMaxLevels], S[kMaxLevels], c[kMaxLevels + 1] = {};
  if (add(Q, count) == 0) return clear<float>(lists, row), 0.0;

  const float top = find_top(s, levels, n);
  const Exponential exponential(lists.temperature);
  float* e = lists.gradient ? static_cast<float*>(lists.gradient) + row * n : nullptr;
  const auto sum_up = count <= 4 ? sum_levels<4> : count <= 8 ? sum_levels<8> : sum_levels<0>;
  sum_up(s, levels, n, top, exponential, e, M);
  const double Z = add(M, count);
  if (Z == 0) return clear<float>(lists, row), 0.0;
  double below[kMaxLevels];  // of the exponentials, the sum over the levels below
  float rivals[kMaxLevels];
  for (float& rival : rivals) rival = -kInfinity;
  for (int l = 0; lists.contrast != 0 && l < count; l++) {
    below[l] = l ? below[l - 1] + M[l - 1] : 0;
    // Further than e^-60 below the top some of them could not be told from 0.
    if (l && w[l] != 0 && below[l] < 1e-26 * Z) return scattered_row<float>(lists, row, scratch);
    if (below[l] != 0) rivals[l] = static_cast<float>(lists.temperature * ::log(below[l]));
  }
  double loss = solve_terms(lists, row, Z, lists.cross, kFloatTolerance, M, F, S, c);

  float C[kMaxLevels] = {};
  for (int l = 0; l < count; l++) C[l] = static_cast<float>(c[l]);
  if ((lists.cross != 0 || lists.contrast != 0) && loss == loss) {
    const auto pull = count <= 4 ? pull_levels<4> : count <= 8 ? pull_levels<8> : pull_levels<0>;
    const Pull found = pull(lists, row, C, top, rivals, lists.contrast != 0 ? nullptr : e);
    if (found.lowest == -kInfinity) return scattered_row<float>(lists, row, scratch);
    loss += lists.contrast * found.opposed;
    if (lists.cross != 0) {
      double divergence = ::log(Z) - found.score / lists.temperature;
      for (int l = 0; l < count; l++) divergence += w[l] > 0 ? Q[l] * ::log(w[l]) : 0;
      loss += lists.cross * divergence;
    }
    if (lists.contrast != 0 && e) {
      double pushed = 0;
      for (int l = count; l-- > 0;) {
        C[l] = static_cast<float>(c[l] + pushed * lists.contrast * lists.scale / lists.temperature);
        pushed += found.slopes[l] == 0 ? 0 : found.slopes[l] / below[l];
      }
      pull(lists, row, C, top, rivals, e);
    }
    for (int l = 0; l < count; l++) C[l] = static_cast<float>(w[l]) > 0 ? 1 : C[l];  // pull has done it
  }
  if (e) {
    const auto scale = count <= 4 ? scale_levels<4> : count <= 8 ? scale_levels<8> : scale_levels<0>;
    scale(e, levels, n, C);
  }
  return loss;
}

// A row whose documents are taken one by one, in double: in the sorted form, where each is a level of its own, of
// float64 in either form, and of what level_row leaves. scratch: see Rows.
template <typename T>
double scattered_row(const Lists& lists, std::int64_t row, double* scratch) {
  const std::int64_t n = lists.columns, count = lists.counts[row], documents = lists.sorted ? count : n;
  const T* s = static_cast<const T*>(lists.scores) + row * lists.stride;
  const std::int32_t* order = static_cast<const std::int32_t*>(lists.index) + row * n;
  const std::uint8_t* levels = static_cast<const std::uint8_t*>(lists.index) + row * n;
  const double* v = static_cast<const double*>(lists.values) + row * lists.width;
  const double* Q = static_cast<const double*>(lists.mass) + row * lists.width;
  const double* w = static_cast<const double*>(lists.share) + row * lists.width;
  double *e = scratch, *P = e + documents, *F = P + count, *S = F + count, *c = S + count;
  clear<T>(lists, row);
  if (add(Q, count) == 0) return 0;

  // body(document, its level, its place in the row) of those present.
  const auto each = [&](auto body) {
    for (std::int64_t i = 0; i < documents; i++)
      if (lists.sorted || levels[i] != kAbsent) body(i, lists.sorted ? i : levels[i], lists.sorted ? order[i] : i);
  };
  double top = -kInfinity, mass = 0;
  each([&](auto, auto l, auto place) {
    top = s[place] > top ? s[place] : top;
    mass += s[place] == -kInfinity ? 0 : w[l];
  });
  top = top == -kInfinity ? 0 : top;  // of nothing, or of NaN alone
  const auto logit = [&](auto place) { return (s[place] - top) / lists.temperature; };
  memset(P, 0, count * sizeof(double));
  each([&](auto i, auto l, auto place) { P[l] += e[i] = ::exp(logit(place)); });
  const double Z = add(P, count);
  if (Z == 0) return 0;
  const double total = ::log(Z), factor = lists.scale / lists.temperature;
  const double tolerance = sizeof(T) == sizeof(double) ? double_tolerance(n) : kFloatTolerance;
  const bool pulls = lists.cross != 0 || lists.contrast != 0;
  double loss = solve_terms(lists, row, Z, mass == 0 ? 0 : lists.cross, tolerance, P, F, S, c);
  T* gradient = lists.gradient ? static_cast<T*>(lists.gradient) + row * n : nullptr;
  // By level: the logarithms of the sums over its rivals, and of what it pulls; then of what pushes it.
  double *rivals = P, *pushes = F;
  if (lists.contrast != 0) {
    Logarithms sums;
    for (std::int64_t l = 0; l < count; l++) F[l] = -kInfinity, S[l] = 0;
    each([&](auto, auto l, auto place) { F[l] = logit(place) > F[l] ? logit(place) : F[l]; });
    each([&](auto, auto l, auto place) { S[l] += F[l] == -kInfinity ? 0 : ::exp(logit(place) - F[l]); });
    for (std::int64_t l = 0, next = 0; l < count; l = next) {  // equal grades are neighbours in the sorted form
      do rivals[next] = sums.value();
      while (++next < count && v[next] == v[l]);
      for (std::int64_t k = l; k < next; k++) sums.add(F[k], S[k]);
    }
    memset(S, 0, count * sizeof(double));
  }
  each([&](auto i, auto l, auto place) {
    double pull = 0;
    if (const double x = pulls && w[l] != 0 ? logit(place) : -kInfinity; x != -kInfinity) {
      const double q = w[l] / mass;
      const auto opposed = lists.contrast != 0 ? oppose(x - rivals[l]) : Opposed<double>{};
      loss += q * (lists.cross * (::log(q) + total - x) + lists.contrast * opposed.loss);
      if (lists.contrast != 0) S[l] += q * opposed.slope;
      pull = q * (lists.cross + lists.contrast * opposed.slope);
    }
    if (gradient) gradient[place] = static_cast<T>(e[i] * c[l] - factor * pull);
  });
  if (lists.contrast == 0 || !gradient) return loss;
  Logarithms sums;
  for (std::int64_t l = count, first = count; l > 0; l = first) {
    do pushes[--first] = sums.value();
    while (first > 0 && v[first - 1] == v[l - 1]);
    for (std::int64_t k = first; k < l; k++)
      if (S[k] > 0) sums.add(-rivals[k], S[k]);
  }
  each([&](auto, auto l, auto place) {
    const double x = logit(place) + pushes[l];
    if (x > -kInfinity) gradient[place] += static_cast<T>(factor * lists.contrast * ::exp(x));
  });
  return loss;
}

double mix_row(const Lists& lists, std::int64_t row, double* scratch) {
  if (lists.scalar == Scalar::kFloat64) return scattered_row<double>(lists, row, scratch);
  return lists.sorted ? scattered_row<float>(lists, row, scratch) : level_row(lists, row, scratch);
}

// Grade levels without a sort: a row is compared with the grades known so far, and looked at one by one only where
// something new turns up.

constexpr std::int64_t kChunk = 256;

// Takes in the grades of y[begin, end). False if they are too many; `nan` is set when one is no number.
template <typename T>
bool add_grades(LevelTable& known, const T* y, const std::uint8_t* mask, std::int64_t begin, std::int64_t end,
                bool& nan) {
  for (std::int64_t i = begin; i < end; i++) {
    if (mask && !mask[i]) continue;
    int l = 0;
    while (l < known.count && y[i] != known.grades[l]) l++;
    if (l < known.count) continue;
    if (y[i] != y[i]) {
      nan = true;
      continue;
    }
    if (known.count == kMaxLevels) return false;
    for (l = known.count++; l > 0 && known.grades[l - 1] > y[i]; l--) known.grades[l] = known.grades[l - 1];
    known.grades[l] = y[i];
  }
  return true;
}

// Writes the levels of a row, and how many of its documents are above each of the first kLevels known grades. Returns
// the length of the row, or the begin of the first chunk that holds an unknown grade.
template <typename T, int kLevels>
std::int64_t assign_levels(const T* y, const std::uint8_t* mask, std::int64_t n, const LevelTable& known,
                           std::uint8_t* levels, std::int64_t* above, std::int64_t& present) {
  constexpr int kCount = kLanes * 4 / sizeof(T);
  using Values = typename Vector<T, kCount>::type;
  using Mask = decltype(Values{} == Values{});
  using Existing = typename Vector<std::uint8_t, kCount>::type;
  T grade[kLevels];
  for (int l = 0; l < kLevels; l++) grade[l] = static_cast<T>(known.grades[l < known.count ? l : known.count - 1]);
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
  std::uint8_t* ids = all.index + row * n;
  double* v = all.values + row * kMaxLevels;
  double *number = all.numbers + row * kMaxLevels, *share = all.shares + row * kMaxLevels;

  // Lists of a batch mostly share their grades: begin with those of the list before. What this list lacks of them is
  // taken out again, so that nothing of a list's result comes from another.
  LevelTable known = table;
  bool seeded = known.count > 0, look = !seeded, nan = false;
  std::int64_t above[kMaxLevels] = {}, present = 0, end = 0;
  while (true) {
    if (look) {
      if (!add_grades(known, y, mask, end, end + kChunk < n ? end + kChunk : n, nan)) {
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

  std::uint8_t own[256];  // the level, counting this list's only
  int count = 0;
  memset(own, kAbsent, sizeof own);
  for (int l = 0; l < kMaxLevels; l++) v[l] = number[l] = share[l] = 0;
  if (nan) {  // a grade that is no number makes the list's loss no number
    memset(ids, 0, n);
    v[0] = v[1] = number[0] = __builtin_nan("");
    all.counts[row] = 2;
    return true;
  }
  for (int l = 0; l < known.count; l++) {
    const std::int64_t found = (l ? above[l - 1] : present) - (l + 1 < known.count ? above[l] : 0);
    if (!found) continue;
    number[count] = static_cast<double>(found);
    v[count] = known.grades[l];
    own[l] = static_cast<std::uint8_t>(count++);
  }
  all.counts[row] = count;
  if (!count) {
    memset(ids, kAbsent, n);
    return true;
  }
  if (count < known.count)
    for (std::int64_t i = 0; i < n; i++) ids[i] = own[ids[i]];
  if (known.count <= 8) table = known;
  for (int l = count; l < kMaxLevels; l++) v[l] = v[count - 1];
  bool seen[256] = {};
  for (std::int64_t i = 0; all.weights && i < n; i++) {
    const double w = all.weights[row * n + i];
    if (ids[i] == kAbsent) continue;
    if (seen[ids[i]] && share[ids[i]] != w) return false;  // equal grades, but not equally relevant
    seen[ids[i]] = true;
    share[ids[i]] = w;
  }
  return true;
}

bool prepare_any_row(const Grades& all, std::int64_t row, LevelTable& table) {
  return all.wide ? prepare_row<double>(all, row, table) : prepare_row<float>(all, row, table);
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
const Rows GRADRET_ISA = {GRADRET_ISA_NAME, mix_row, prepare_any_row, fold_row, unfold_row};

}  // namespace gradret::cpu
