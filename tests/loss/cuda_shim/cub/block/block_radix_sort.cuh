// Stands in for CUB's: same interface and result, one thread sorts.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>

namespace cub {

template <typename Key, int kThreads, int kItems, typename Value>
class BlockRadixSort {
 public:
  struct TempStorage {
    Key keys[kThreads * kItems];
    Value values[kThreads * kItems];
    int order[kThreads * kItems];
  };
  explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}

  void SortBlockedToStriped(Key (&keys)[kItems], Value (&values)[kItems]) {
    const int thread = threadIdx.x;
    for (int item = 0; item < kItems; ++item) {
      storage_.keys[thread * kItems + item] = keys[item];
      storage_.values[thread * kItems + item] = values[item];
    }
    __syncthreads();
    if (thread == 0) {
      std::iota(storage_.order, storage_.order + kThreads * kItems, 0);
      std::stable_sort(storage_.order, storage_.order + kThreads * kItems,
                       [&](int a, int b) { return storage_.keys[a] < storage_.keys[b]; });
    }
    __syncthreads();
    for (int item = 0; item < kItems; ++item) {
      const int from = storage_.order[item * kThreads + thread];
      keys[item] = storage_.keys[from];
      values[item] = storage_.values[from];
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
