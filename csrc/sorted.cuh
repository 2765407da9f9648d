// Lists with real-valued grades: sorting them by grade, and their loss and gradient from prefix sums along the list in
// that order.
#pragma once

#include <cub/block/block_radix_sort.cuh>

#include "block.cuh"

namespace gradret::cuda {

constexpr int kRun = 4;  // consecutive positions a thread takes of a tile
constexpr int kSortedThreads = 448;  // two blocks of them leave a thread 72 registers
constexpr std::int64_t kSortedThreadsAtOnce = 1 << 17;  // about what a large GPU runs at once; bounds the scratch
constexpr int kScratchArrays = 4;                       // of the columns of a list, for each block

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

// A CDF kept as sums that still lack their common factor; it ends at 1 and never decreases.
struct Cdf {
  const float* sums;
  float factor;
  __device__ float operator[](int i) const { return fminf(sums[i] * factor, 1); }
};

// First position in [0, n) where cdf >= u (> u with kAbove), or n.
template <bool kAbove>
__device__ int find_quantile(const Cdf& cdf, int n, float u) {
  int low = 0, high = n;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool before = kAbove ? cdf[middle] <= u : cdf[middle] < u;
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// This thread's part of W_2^2, the integral of (F^-1 - G^-1)^2: both are constant between neighbours of their merged
// steps. Every thread takes as many of the 2 n steps, wherever they lie: a saturated softmax has all of F's in one
// place.
__device__ inline float integrate_quantiles(const Cdf& F, const Cdf& G, const float* v, int n) {
  const int share = (2 * n + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int start = min(static_cast<int>(threadIdx.x) * share, 2 * n), end = min(start + share, 2 * n);
  // i of F's steps and j of G's are the first `start` merged ones, F's first among equals.
  int low = max(0, start - n), high = min(start, n);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (F[middle] <= G[start - 1 - middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int i = low, j = start - low;
  float u = fmaxf(i > 0 ? F[i - 1] : 0, j > 0 ? G[j - 1] : 0);
  float sum = 0;
#pragma unroll 1
  for (int step = start; step < end; ++step) {
    const bool of_F = j == n || (i < n && F[i] <= G[j]);
    const float next = of_F ? F[i] : G[j];
    const float difference = v[min(i, n - 1)] - v[min(j, n - 1)];
    sum += (next - u) * difference * difference;
    u = next;
    if (of_F) {
      ++i;
    } else {
      ++j;
    }
  }
  return sum;
}

// One block per list, and the next list when it is done. Passes: gather the scores in the order of the grades and find
// their maximum; prefix sums F and G; for the cross-entropy, sums over documents with target mass; from the end, suffix
// sums S, slopes t and sums of t S; prefix sums of t F and the gradient, scattered to the documents' places. Between
// passes a list lies in the block's scratch; a barrier, its own or a scan's, stands wherever a thread reads there what
// another wrote.
template <typename Scalar>
__global__ void __launch_bounds__(kSortedThreads, 2) mix_sorted(const TypedLists<Scalar> lists, float* scratch) {
  __shared__ BlockExchange exchange;
  Block block(exchange);
  const int thread = threadIdx.x, threads = blockDim.x, tile = threads * kRun;
  float* const sorted = scratch + blockIdx.x * kScratchArrays * lists.columns;
  float* const F_sums = sorted + lists.columns;
  float* const G_sums = F_sums + lists.columns;
  float* const above = G_sums + lists.columns;

  for (std::int64_t row = blockIdx.x; row < lists.rows; row += gridDim.x) {
    const int n = lists.counts[row];
    const Scalar* scores = lists.scores_of(row);
    const std::int32_t* index = lists.positions_of(row);
    const float* v = lists.values + row * lists.columns;
    const float* q = lists.mass + row * lists.columns;
    Scalar* gradient = lists.gradient == nullptr ? nullptr : lists.gradient_of(row);

    float top = -INFINITY;
    for (int i = thread; i < n; i += threads) {
      const float score = to_float(scores[index[i]]);
      sorted[i] = score;
      top = fmaxf(top, score);
    }
    top = block.max(top);

    float Z = 0, target_total = 0;
    for (int start = 0; start < n; start += tile) {
      const int first = start + thread * kRun;
      float e[kRun], mass[kRun], e_sum = 0, mass_sum = 0;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const bool used = first + k < n;
        e[k] = e_sum += used ? exp_below(sorted[first + k], top, lists.exponent) : 0;
        mass[k] = mass_sum += used ? q[first + k] : 0;
      }
      float e_before, e_after, mass_before, mass_after;
      block.scan<true>(e_sum, Z, e_before, e_after);
      block.scan<true>(mass_sum, target_total, mass_before, mass_after);
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        if (first + k >= n) break;
        F_sums[first + k] = fminf(e_before + e[k], e_after);
        G_sums[first + k] = fminf(mass_before + mass[k], mass_after);
      }
    }
    __syncthreads();

    const float check = Z + target_total;
    if (Z == 0 || target_total == 0 || check != check) {
      const bool alive = Z != 0 && target_total != 0;  // then it is NaN, and must show
      if (thread == 0) lists.loss[row] = alive ? check : 0;
      if (gradient == nullptr) continue;
      for (std::int64_t i = thread; i < lists.columns; i += threads) {
        from_float(alive && i < n ? check : 0, gradient[index[i]]);
      }
      continue;
    }

    // The cross-entropy: this thread's part of the loss, and what the gradient is made of.
    float loss = 0, of_mass = 0;
    if (lists.cross != 0) {
      Pull pull;
      for (int i = thread; i < n; i += threads) {
        if (q[i] != 0 && sorted[i] != -INFINITY) pull.add(lists, q[i], sorted[i], top, 0);
      }
      pull = block.sum(pull);
      loss = thread == 0 ? pull.loss(lists, Z) : 0;
      of_mass = pull.mass == 0 ? 0 : 1 / pull.mass;
    }

    const Cdf F = {F_sums, 1 / Z}, G = {G_sums, 1 / target_total};
    if (lists.order == 2 && lists.transport != 0) loss += lists.transport * integrate_quantiles(F, G, v, n);
    const int last = find_quantile<false>(G, n, G[n - 1]);  // highest position with target mass

    float S_carry = 0, above_carry = 0;
    for (int start = 0; start < n; start += tile) {
      float S[kRun], tS[kRun], sum = 0;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int i = n - 1 - (start + thread * kRun + k);
        S[k] = sum;
        if (i >= 0) sum += exp_below(sorted[i], top, lists.exponent);
      }
      float before, after;
      block.scan<false>(sum, S_carry, before, after);
      sum = 0;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int i = n - 1 - (start + thread * kRun + k);
        float t = 0;
        if (i >= 0 && i < n - 1) {
          const float gap = lists.transport * (v[i + 1] - v[i]), G_i = G[i], F_i = snap(F[i], G_i, kTolerance);
          if (lists.order == 1) {
            loss += gap * fabsf(F_i - G_i);
            t = slope1(gap, F_i, G_i);
          } else if (gap > 0) {
            const int left = min(find_quantile<false>(G, n, F_i), last);
            const int right = min(find_quantile<true>(G, n, F_i), last);
            t = slope2(gap, (v[left] + v[right]) / 2, (v[i] + v[i + 1]) / 2);
          }
          F_sums[i] = t * F_i;  // the scan's barrier came after all that read F of other threads
        }
        tS[k] = sum += t * ((before + S[k]) / Z);
      }
      block.scan<false>(sum, above_carry, before, after);
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int i = n - 1 - (start + thread * kRun + k);
        if (i >= 0) above[i] = before + tS[k];
      }
    }
    loss = block.sum(loss);
    if (thread == 0) lists.loss[row] = loss;

    if (gradient != nullptr) {
      float below_carry = 0;
      for (int start = 0; start < n; start += tile) {
        const int first = start + thread * kRun;
        float tF[kRun], sum = 0;
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          tF[k] = sum;
          if (first + k < n - 1) sum += F_sums[first + k];
        }
        float before, after;
        block.scan<false>(sum, below_carry, before, after);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          const int i = first + k;
          if (i >= n) break;
          const float score = sorted[i], p = exp_below(score, top, lists.exponent) / Z;
          float value = p * (above[i] - (before + tF[k]) + (of_mass == 0 ? 0 : lists.cross));
          if (q[i] > 0 && score != -INFINITY && of_mass != 0) value -= q[i] * of_mass * lists.cross;
          from_float(lists.scale * value, gradient[index[i]]);
        }
      }
      for (std::int64_t i = n + thread; i < lists.columns; i += threads) from_float(0, gradient[index[i]]);
    }
    __syncthreads();  // the next list overwrites the scratch
  }
}

}  // namespace gradret::cuda
