// What the CPU and the CUDA side are called with. Plain pointers and sizes; no torch, no CUDA header.
//
// Grades do not change while scores do, so all that depends on them alone is prepared once and comes in one of two
// forms:
//
//   levels  every list has at most kMaxLevels distinct grades. index: uint8 (rows, columns), the level of each
//   document,
//           kAbsent where there is none. values, mass: (rows, width), ascending grades and the target mass at each.
//           counts: (rows), the number of levels of each list.
//   sorted  any real grades. index: int32 (rows, columns), the permutation that sorts a list by grade, absent documents
//           last. values, mass: (rows, columns), grade and target mass in that order. counts: (rows), documents
//           present.
//
// Target mass sums to 1 in a list, or is 0 everywhere, which makes loss and gradient of that list 0. Tables of grades
// and mass are double on the CPU and float on CUDA. All arrays but `scores` and tiles are contiguous.
#pragma once

#include <cstdint>

namespace gradret {

constexpr int kMaxLevels = 32;
constexpr std::uint8_t kAbsent = 255;
constexpr int kMaxSortColumns = 8192;  // longest list that cuda::sort_grades takes

enum class Scalar : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Loss and gradient of each list: W_p^p along the grade axis between softmax(scores / temperature) and the target mass.
struct Lists {
  const void* scores;  // (rows, columns) of `scalar`, row stride `stride` elements, inner stride 1
  Scalar scalar;
  std::int64_t rows, columns, stride;
  const void* index;           // uint8 levels or int32 permutation
  bool sorted;                 // which of the two
  const void* values;          // (rows, width)
  const void* mass;            // (rows, width)
  const std::int32_t* counts;  // (rows)
  std::int64_t width;
  int order;  // 1 or 2
  double temperature;
  double scale;    // the gradient is multiplied by it: 1 / rows for a mean
  void* loss;      // (rows) float, or double for double scores; every entry is written
  void* gradient;  // (rows, columns) of `scalar`, or null when not wanted; every entry is written
};

// A tile of the matrix of scores between queries and documents on its way into one log-sum-exp a row, for fused
// scoring. Pairs with a grade of their own are left out of it. Scratch: a tile may be overwritten.
struct Tile {
  float* scores;  // (rows, columns), row stride `stride`
  std::int64_t rows, columns, stride;
  std::int64_t first_column;         // of the tile in the whole matrix
  const std::int64_t* pair_offsets;  // (rows + 1), into pair_columns and pair_values
  const std::int32_t* pair_columns;  // in the whole matrix, ascending within a row
  float* pair_values;  // of each pair in the tile: fold_tile writes its score, unfold_tile reads its gradient
  double temperature;
  float* top;           // (rows) running maximum of scores, starts at -inf
  double* sum;          // (rows) running sum of exp((score - top) / temperature), starts at 0
  const float* weight;  // (rows) for unfold_tile: the gradient of the row's log-sum-exp, in units of score
};

}  // namespace gradret
