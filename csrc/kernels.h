// What all files share: the data that the CPU and the CUDA side are called with, the arithmetic that both use, and what
// each offers. Plain pointers and sizes; no torch, no CUDA header.
//
// Grades do not change while scores do, so all that depends on them alone is prepared once and comes in one of two
// forms:
//
//   levels  every list has at most kMaxLevels distinct grades, and equal grades weigh the same. index: uint8 (rows,
//           columns), the level of each document, kAbsent where there is none. values, mass, share: (rows, width),
//           ascending grades, the target mass at each, and that of one document there. counts: (rows), the number of
//           levels of each list.
//   sorted  any real grades. index: int32 (rows, columns), the permutation that sorts a list by grade, absent documents
//           last. values, mass: (rows, columns), grade and target mass in that order; share is the same as mass.
//           counts: (rows), documents present.
//
// Target mass sums to 1 in a list, or is 0 everywhere, which makes loss and gradient of that list 0. Tables of grades
// and mass are double on the CPU and float on CUDA. All arrays but `scores` and tiles are contiguous.
//
// The loss of a list is a sum of three terms with weights, a function of p = softmax(scores / temperature), of the
// documents' target mass q and of their grades:
//
//   transport  W_p^p along the grade axis, of order 1 or 2.
//   cross      KL(q || p).
//   contrast   the sum of q_i * -log e_i / (e_i + R_i), with e = exp(scores / temperature) and R_i the sum of e over
//              the documents of lower grade, i's rivals. A document without rivals adds 0.
//
// With Z the sum of e over all documents, s_i = R_i / (e_i + R_i) and c_i the potential of the transport,
// temperature * d loss / d score_i is
//
//   p_i (transport c_i + cross) - q_i (cross + contrast s_i) + contrast e_i * sum of q_j s_j / R_j
//
// where the sum is over the documents j of higher grade.
//
// For cross and contrast documents of score -inf are absent, and q is normalised without them.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define GRADRET_HD __host__ __device__
#else
#define GRADRET_HD
#endif

namespace gradret {

constexpr int kMaxLevels = 32;
constexpr std::uint8_t kAbsent = 255;
constexpr int kMaxSortColumns = 8192;  // longest list that cuda::sort_grades takes

enum class Scalar : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Grades on their way into levels.
struct Grades {
  const void* grades;  // (rows, columns) float, or double where `wide`, contiguous
  bool wide;
  const std::uint8_t* mask;  // (rows, columns), non-zero where a document exists; null for all
  const double* weights;     // (rows, columns), what the documents weigh; null where that depends on grades alone
  std::int64_t rows, columns;
  std::uint8_t* index;   // the outputs, as above
  double* values;        // (rows, kMaxLevels)
  double* numbers;       // (rows, kMaxLevels), documents of each level
  double* shares;        // (rows, kMaxLevels), what one of them weighs, where there are weights
  std::int32_t* counts;  // (rows)
};

// Loss and gradient of each list.
struct Lists {
  const void* scores;  // (rows, columns) of `scalar`, row stride `stride` elements, inner stride 1
  Scalar scalar;
  std::int64_t rows, columns, stride;
  const void* index;           // uint8 levels or int32 permutation
  bool sorted;                 // which of the two
  const void* values;          // (rows, width)
  const void* mass;            // (rows, width)
  const void* share;           // (rows, width)
  const std::int32_t* counts;  // (rows)
  std::int64_t width;
  int order;                          // 1 or 2
  double transport, cross, contrast;  // the weights of the terms
  double temperature;
  double scale;    // the gradient is multiplied by it: 1 / rows for a mean
  void* loss;      // (rows) float, or double for double scores; every entry is written
  void* gradient;  // (rows, columns) of `scalar`, or null when not wanted; every entry is written
};

// A tile of the matrix of scores between queries and documents on its way into one log-sum-exp per row, for fused
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

// The arithmetic of one gap between neighbouring grades, where F and G are the predicted and the target CDF. Source:
// Peyré and Cuturi (2019), section 2.6; the formulas are in gradret/loss/reference.py. Static: files that are compiled
// for several instruction sets must not share them.

// F and G are equal when they differ by no more than the rounding of the sums they are made of: there the subgradient
// of the loss is 0. `tolerance` is 8 units in the last place of the masses' type.
template <typename T>
GRADRET_HD static inline T snap(T F, T G, T tolerance) {
  const T difference = F > G ? F - G : G - F;
  const T larger = F > G ? F : G;
  return difference <= tolerance * larger ? G : F;
}

// d loss / d F, order 1.
template <typename T>
GRADRET_HD static inline T slope1(T gap, T F, T G) {
  return F > G ? gap : (F < G ? -gap : (F == G ? T(0) : F + G));  // F + G: NaN shows
}

// The same, order 2. `quantile` is G^-1(F), the mean of its left and right limits where F meets a step of G; `middle`
// the mean of the two grades.
template <typename T>
GRADRET_HD static inline T slope2(T gap, T quantile, T middle) {
  return 2 * gap * (quantile - middle);
}

// A document with target mass against its rivals, its score being `above` their log-sum-exp in units of the
// temperature: the contrast's term and s_i.
template <typename T>
struct Opposed {
  T loss, slope;
};
template <typename T>
GRADRET_HD static inline Opposed<T> oppose(T above) {
  const T y = ::exp(above > 0 ? -above : above);
  return {(above > 0 ? T(0) : -above) + T(::log1p(y)), (above > 0 ? y : T(1)) / (1 + y)};
}

namespace cpu {

// The instruction set in use, the best that this processor has: "baseline", "avx2" or "avx512".
const char* instruction_set();
// Another one, for tests; false if this processor lacks it.
bool use_instruction_set(const char* name);

// Float32 and float64 scores; tables in double. lists.loss holds one loss per list if `reduced` is 0, else
// one number: `reduced` times their sum.
void mix(const Lists& lists, double reduced, int threads);
// False when the level form cannot hold a list: then nothing is promised of the outputs.
bool prepare_levels(const Grades& grades, int threads);
void fold_tile(const Tile& tile, int threads);
void unfold_tile(const Tile& tile, int threads);

// Between cpu.cpp and cpu_rows.cpp, which is compiled once for each instruction set.

// Grades known so far, ascending: those of the list before are a first guess at those of the next.
struct LevelTable {
  int count;
  double grades[kMaxLevels];
};

// The work on one row, picked at run time.
struct Rows {
  const char* name;
  // Returns the row's loss. `scratch`: columns + 4 * max(columns, kMaxLevels) doubles.
  double (*mix)(const Lists& lists, std::int64_t row, double* scratch);
  bool (*prepare_levels)(const Grades& grades, std::int64_t row, LevelTable& table);
  void (*fold)(const Tile& tile, std::int64_t row);
  void (*unfold)(const Tile& tile, std::int64_t row);
};

extern const Rows kBaselineRows;
#ifdef GRADRET_X86
extern const Rows kAvx2Rows;
extern const Rows kAvx512Rows;
#endif

}  // namespace cpu

// Each launches on `stream` of `device`, a cudaStream_t, without waiting for it, leaves the current device as it was,
// and throws std::runtime_error with CUDA's message.
namespace cuda {

// Bytes of scratch that mix() needs beside its arguments; 0 for lists that stay in registers.
std::int64_t scratch_bytes(const Lists& lists);
// Float32, bfloat16 and float16 scores; sums in float32. No contrast in the sorted form.
void mix(const Lists& lists, std::uintptr_t scratch, int device, std::uintptr_t stream);
// Stable sort of each list by grade, absent documents last (columns <= kMaxSortColumns): index, values in that order
// (an absent document repeats the list's highest grade, 0 in a list without documents) and counts of the sorted form.
// mask: (rows, columns) bytes, non-zero where a document exists, or null.
void sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                 std::int32_t* index, float* values, std::int32_t* counts, int device, std::uintptr_t stream);
// Writes the scores of the tile's pairs to pair_values and folds the rest into top and sum; deterministic.
void fold_tile(const Tile& tile, int device, std::uintptr_t stream);
// Overwrites a tile with weight[row] * exp((score - top) / temperature) / sum, pairs with their pair_values; 0 where
// sum is 0.
void unfold_tile(const Tile& tile, int device, std::uintptr_t stream);

}  // namespace cuda
}  // namespace gradret
