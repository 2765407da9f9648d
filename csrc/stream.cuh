// Loss and gradient of lists with few distinct grades that are too long for the registers of a block: read twice, once
// for their masses and once for their gradient.
#pragma once

#include "levels.cuh"

namespace gradret::cuda {

constexpr int kStreamThreads = 768;  // 1024 would leave a thread too few registers

// Documents begin .. end - 1 of a list, for a block to go through; begin is a multiple of 8, so that packs stay
// aligned.
struct Slice {
  std::int64_t row, begin, end;
};

// The masses of a warp's part of a slice.
template <typename Scalar>
__device__ Masses sum_slice(const LevelLists<Scalar>& lists, const Slice& slice, int levels, int lane, int warp) {
  const Scalar* scores = lists.scores + slice.row * lists.stride;
  const std::uint8_t* index = lists.index + slice.row * lists.columns;
  const std::int64_t step = std::int64_t{blockDim.x} * kItems;  // each warp its part of every tile
  Masses own = {-INFINITY, 0};
  for (std::int64_t start = slice.begin + warp * kWarpColumns; start < slice.end; start += step) {
    const int count = static_cast<int>(min(slice.end - start, kWarpColumns));
    Share share = load_share(scores + start, index + start, count, lane, lists.vectors);
    const Masses next = sum_share(share, levels, own.top, lists.exponent, lane);
    own = {next.top, own.mass * exp_below(own.top, next.top, lists.exponent) + next.mass};
  }
  return own;
}

// Writes the gradient of a slice, from its end, where the last tiles read still lie in the cache.
template <typename Scalar>
__device__ void write_slice(const LevelLists<Scalar>& lists, const Slice& slice, float top, const Solution& solution,
                            int lane, int warp) {
  const Scalar* scores = lists.scores + slice.row * lists.stride;
  const std::uint8_t* index = lists.index + slice.row * lists.columns;
  Scalar* gradient = lists.gradient + slice.row * lists.columns;
  const std::int64_t step = std::int64_t{blockDim.x} * kItems;
  const std::int64_t last_tile = slice.begin + (slice.end - 1 - slice.begin) / step * step;
  for (std::int64_t start = last_tile + warp * kWarpColumns; start >= slice.begin; start -= step) {
    const int count = static_cast<int>(min(slice.end - start, kWarpColumns));
    Share share = load_share(scores + start, index + start, count, lane, lists.vectors);
#pragma unroll
    for (int item = 0; item < kItems; ++item) share.score[item] = exp_below(share.score[item], top, lists.exponent);
    if (!solution.alive) share.drop_all();
    store_share(gradient + start, count, lane, lists.vectors, share, solution.worth * lists.scale);
  }
}

// Many lists of any length: one block a list, which reads it twice. Writes as transport_levels does. One barrier.
template <typename Scalar>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_levels(const LevelLists<Scalar> lists) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Slice list = {blockIdx.x, 0, lists.columns};
  const Table table = load_table(lists, list.row, lane);
  const Masses own = sum_slice(lists, list, table.levels, lane, warp);
  const Masses all = combine_warps(own, lists.exponent, lane, warp);
  const Solution solution = solve_levels(all.mass, table, lists.order, lane);
  if (threadIdx.x == 0) lists.loss[list.row] = solution.loss;
  if (lists.gradient != nullptr) write_slice(lists, list, all.top, solution, lane, warp);
}

// Few long lists, cut into up to 32 slices each so that every multiprocessor has work: two launches of one block a
// slice.
struct Slices {
  int count;             // of each list
  std::int64_t columns;  // of each slice but the last
  float* tops;           // (rows, count)
  float* masses;         // (rows, count, kMaxLevels)

  __device__ Slice take(unsigned block, std::int64_t all_columns) const {
    const std::int64_t begin = block % count * columns;
    return {block / count, begin, min(begin + columns, all_columns)};
  }
};

// Reads one slice and writes its maximum and masses. One barrier.
template <typename Scalar>
__global__ void __launch_bounds__(kStreamThreads, 1) sum_slices(const LevelLists<Scalar> lists, const Slices slices) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Slice slice = slices.take(blockIdx.x, lists.columns);
  const Masses own = sum_slice(lists, slice, lists.counts[slice.row], lane, warp);
  const Masses all = combine_warps(own, lists.exponent, lane, warp);
  if (warp > 0) return;
  slices.masses[std::int64_t{blockIdx.x} * kMaxLevels + lane] = all.mass;
  if (lane == 0) slices.tops[blockIdx.x] = all.top;
}

// Solves a list from the masses of all its slices, as every block of it does, reads one slice again and writes its
// gradient; the first also writes the loss. No barrier.
template <typename Scalar>
__global__ void __launch_bounds__(kStreamThreads, 1) write_slices(const LevelLists<Scalar> lists, const Slices slices) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Slice slice = slices.take(blockIdx.x, lists.columns);
  if (lists.gradient == nullptr && slice.begin > 0) return;
  const Table table = load_table(lists, slice.row, lane);
  const std::int64_t first = slice.row * slices.count;
  const Masses all =
      combine_parts(slices.tops + first, slices.masses + first * kMaxLevels, slices.count, lists.exponent, lane);
  const Solution solution = solve_levels(all.mass, table, lists.order, lane);
  if (threadIdx.x == 0 && slice.begin == 0) lists.loss[slice.row] = solution.loss;
  if (lists.gradient != nullptr) write_slice(lists, slice, all.top, solution, lane, warp);
}

}  // namespace gradret::cuda
