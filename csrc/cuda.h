// The CUDA side, called from bind.cpp. Each function launches on `stream` of `device` without waiting for it, leaves
// the current device as it was, and returns a cudaError_t, 0 for success.
#pragma once

#include "lists.h"

namespace gradret::cuda {

// Bytes of scratch that transport() needs beside its arguments; 0 for lists that stay in registers.
std::int64_t transport_scratch_bytes(const Lists& lists);
// Float32, bfloat16 and float16 scores; sums in float32.
int transport(const Lists& lists, void* scratch, int device, void* stream);

// Stable sort of each list by grade, absent documents last (columns <= kMaxSortColumns): index, values in that order
// (an absent document repeats the list's highest grade, 0 in a list without documents) and counts of the sorted form.
// mask: (rows, columns) bytes, non-zero where a document exists, or null.
int sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                std::int32_t* index, float* values, std::int32_t* counts, int device, void* stream);

// gradient (rows, columns) *= *factor, or *= factor[row] if by_row, in place; touches no memory where the factor is 1.
int scale_gradient(void* gradient, Scalar scalar, std::int64_t rows, std::int64_t columns, const float* factor,
                   bool by_row, int device, void* stream);

// Writes the scores of the tile's pairs to pair_values and folds the rest into top and sum; deterministic.
int fold_tile(const Tile& tile, int device, void* stream);
// Overwrites a tile with weight[row] * exp((score - top) / temperature) / sum, pairs with their pair_values; 0 where
// sum is 0.
int unfold_tile(const Tile& tile, int device, void* stream);

}  // namespace gradret::cuda
