// Sorts lists by grade.
#pragma once

#include <cub/block/block_radix_sort.cuh>

#include "block.cuh"
#include "lists.h"

namespace gradret::cuda {

constexpr std::uint32_t kAbsentKey = 0xffffffffu;

// An unsigned number that orders as the grade does: 0 and -0 are one, NaN comes last but for absent documents.
__device__ inline std::uint32_t grade_key(float grade) {
  const std::uint32_t bits = __float_as_uint(grade == 0 ? 0.0f : grade);
  const std::uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return grade != grade ? kAbsentKey - 1 : key;
}

__device__ inline float key_grade(std::uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// One block sorts one list of up to kThreads * kPerThread documents. Reads grades and mask once, writes index, values
// and count. Radix sort keeps the order of equals, and what fills up the block comes after all documents, so that it
// stays behind the absent ones.
template <int kThreads, int kPerThread>
__global__ void __launch_bounds__(kThreads) sort_by_grade(const float* grades, const std::uint8_t* mask, int columns,
                                                          std::int32_t* index, float* values, std::int32_t* counts) {
  using Sort = cub::BlockRadixSort<std::uint32_t, kThreads, kPerThread, std::int32_t>;
  __shared__ typename Sort::TempStorage storage;
  __shared__ float highest;
  const std::int64_t row = blockIdx.x, offset = row * columns;
  const int thread = threadIdx.x;

  std::uint32_t keys[kPerThread];
  std::int32_t positions[kPerThread];
#pragma unroll
  for (int item = 0; item < kPerThread; ++item) {
    const int position = thread * kPerThread + item;
    const bool present = position < columns && (mask == nullptr || mask[offset + position] != 0);
    keys[item] = present ? grade_key(grades[offset + position]) : kAbsentKey;
    positions[item] = position;
  }
  Sort(storage).SortBlockedToStriped(keys, positions);

  int count = 0;
#pragma unroll
  for (int item = 0; item < kPerThread; ++item) count += __syncthreads_count(keys[item] != kAbsentKey);
#pragma unroll
  for (int item = 0; item < kPerThread; ++item) {
    if (item * kThreads + thread == count - 1) highest = key_grade(keys[item]);
  }
  if (thread == 0) {
    counts[row] = count;
    if (count == 0) highest = 0;
  }
  __syncthreads();
#pragma unroll
  for (int item = 0; item < kPerThread; ++item) {
    const int position = item * kThreads + thread;
    if (position >= columns) break;
    index[offset + position] = positions[item];
    values[offset + position] = position < count ? key_grade(keys[item]) : highest;
  }
}

}  // namespace gradret::cuda
