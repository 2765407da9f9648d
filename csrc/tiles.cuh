// Folding tiles of scores into one log-sum-exp per row, and unfolding its gradient.
#pragma once

#include "block.cuh"

namespace gradret::cuda {

constexpr int kFoldThreads = 256;
constexpr int kBatch = 4;  // loads in flight before the first is used

// Calls body(score, value) for each pair of the row that lies in the tile; the block's threads share them.
template <typename Body>
__device__ void each_pair(const Tile& tile, std::int64_t row, Body body) {
  const std::int64_t end = tile.pair_offsets[row + 1];
  for (std::int64_t i = tile.pair_offsets[row] + threadIdx.x; i < end; i += blockDim.x) {
    const std::int64_t column = tile.pair_columns[i] - tile.first_column;
    if (column >= 0 && column < tile.columns) body(tile.scores[row * tile.stride + column], tile.pair_values[i]);
  }
}

// One block folds one row of a tile into top and sum: moves the scores of its pairs to pair_values, -inf in their
// place, reads the row once, writes the two numbers.
__global__ void __launch_bounds__(kFoldThreads) fold_rows(const Tile tile, float exponent) {
  __shared__ BlockExchange exchange;
  Block block(exchange);
  const std::int64_t row = blockIdx.x;
  const float* scores = tile.scores + row * tile.stride;
  each_pair(tile, row, [](float& score, float& value) {
    value = score;
    score = -INFINITY;
  });
  __syncthreads();

  float top = -INFINITY, sum = 0;
  for (std::int64_t first = threadIdx.x; first < tile.columns; first += kBatch * kFoldThreads) {
    float score[kBatch], highest = top;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const std::int64_t column = first + k * kFoldThreads;
      score[k] = column < tile.columns ? scores[column] : -INFINITY;
      highest = fmaxf(highest, score[k]);
    }
    sum *= exp_below(top, highest, exponent);
    top = highest;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) sum += exp_below(score[k], top, exponent);
  }
  const float old_top = tile.top[row];
  const float new_top = fmaxf(block.max(top), old_top);
  sum = block.sum(sum * exp_below(top, new_top, exponent));
  if (threadIdx.x == 0) {
    tile.sum[row] = tile.sum[row] * exp_below(old_top, new_top, exponent) + sum;
    tile.top[row] = new_top;
  }
}

// One block overwrites one row of a tile with weight * exp((score - top) / temperature) / sum, then its pairs with
// pair_values, whatever came of their scores.
__global__ void __launch_bounds__(kFoldThreads) unfold_rows(const Tile tile, float exponent) {
  const std::int64_t row = blockIdx.x;
  float* scores = tile.scores + row * tile.stride;
  const float top = tile.top[row], sum = static_cast<float>(tile.sum[row]);
  const float worth = sum == 0 ? 0 : tile.weight[row] / sum;
  for (std::int64_t column = threadIdx.x; column < tile.columns; column += kFoldThreads) {
    scores[column] = sum == 0 ? 0 : worth * exp_below(scores[column], top, exponent);
  }
  __syncthreads();
  each_pair(tile, row, [](float& score, float& value) { score = value; });
}

}  // namespace gradret::cuda
