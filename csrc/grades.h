// Grade levels of one row without a sort: the row is compared with the grades known so far, and looked at one by one
// only where something new turns up. For files that are compiled once for each instruction set.
#pragma once

#include <math.h>

#include "cpu.h"
#include "vectors.h"

namespace gradret::cpu {
namespace {

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
bool prepare_row(const Grades& all, std::int64_t row, std::uint8_t* levels, LevelTable& table) {
  const std::int64_t n = all.columns;
  const T* y = static_cast<const T*>(all.grades) + row * n;
  const std::uint8_t* mask = all.mask ? all.mask + row * n : nullptr;
  std::uint8_t* ids = levels + row * n;
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

}  // namespace
}  // namespace gradret::cpu
