// The CPU side, called from bind.cpp: loss and gradient, the preparation of grades, and the tiles of fused scoring.
#pragma once

#include <cstdint>

#include "lists.h"

namespace gradret::cpu {

enum class Grade : int { kFloat32 = 0, kFloat64 = 1, kInt64 = 2 };
enum class Targets : int { kGain = 0, kSoftmax = 1, kWeights = 2 };

// Grades on their way into one of the two forms of Lists.
struct Grades {
  const void* grades;  // (rows, columns) of `grade`, contiguous
  Grade grade;
  const std::uint8_t* mask;  // (rows, columns), non-zero where a document exists; null for all
  const double* weights;     // (rows, columns), >= 0, for Targets::kWeights
  Targets targets;
  std::int64_t rows, columns;
  double* values;        // (rows, kMaxLevels), or (rows, columns) for the sorted form
  double* mass;          // likewise
  std::int32_t* counts;  // (rows)
};

// The instruction set in use, the best that this processor has: "baseline", "avx2" or "avx512".
const char* instruction_set();
// Another one, for tests; false if this processor lacks it.
bool use_instruction_set(const char* name);

// Float32, bfloat16 and float64 scores; tables in double. lists.loss holds one loss a list if `reduced` is 0, else one
// number: `reduced` times their sum. False when scratch memory could not be had.
bool transport(const Lists& lists, double reduced, int threads);
// The level form. False when a list has more than kMaxLevels distinct grades: then nothing is promised of the outputs.
bool prepare_levels(const Grades& grades, std::uint8_t* levels, int threads);
// The sorted form, for any grades.
void prepare_sorted(const Grades& grades, std::int32_t* index, int threads);
void fold_tile(const Tile& tile, int threads);
void unfold_tile(const Tile& tile, int threads);

// The grades of the list before, of whatever type: a first guess at those of the next. All zero to begin with.
struct LevelTable {
  std::int64_t count;
  std::int64_t grades[kMaxLevels];
};

// The work on one row: compiled once for each instruction set (cpu_rows.cpp), picked at run time.
struct Rows {
  const char* name;
  // Each returns the row's loss. `work`: columns floats (doubles for float64) of scratch; for float32 it may be the
  // gradient's row itself.
  double (*level_row)(const Lists& lists, std::int64_t row, void* work);
  // `work`: columns floats (doubles for float64), then 4 * columns doubles.
  double (*sorted_row)(const Lists& lists, std::int64_t row, void* work, double* tables);
  bool (*prepare_row)(const Grades& grades, std::int64_t row, std::uint8_t* levels, LevelTable& table);
  void (*fold_row)(const Tile& tile, std::int64_t row);
  void (*unfold_row)(const Tile& tile, std::int64_t row);
};

extern const Rows kBaselineRows;
#ifdef GRADRET_X86
extern const Rows kAvx2Rows;
extern const Rows kAvx512Rows;
#endif

// Turns grades' level or document weights into target mass: `mass` holds counts (gain, softmax) or sums of weights.
void finish_mass(Targets targets, std::int64_t count, const double* values, double* mass);

}  // namespace gradret::cpu
