// Loss and gradient of lists with few distinct grades. The loss depends on the scores through one sum of exponentials
// per level, so that a list is read once, reduced to at most 32 numbers, solved by a warp, and its gradient written.
// Lists that are too long for the registers of a block are read twice, once for their masses and once for their
// gradient.
#pragma once

#include "block.cuh"

namespace gradret::cuda {

constexpr int kItems = 16;         // documents a thread holds in registers
constexpr int kListsPerBlock = 4;  // where a warp takes a list
constexpr int kStreamThreads = 768;  // for lists that are read twice; 1024 would leave a thread too few registers
constexpr int kMaxBlockThreads = 1024;
constexpr int kMaxWarps = kMaxBlockThreads / kWarp;
constexpr std::int64_t kWarpColumns = kWarp * kItems;
constexpr std::int64_t kBlockColumns = kMaxBlockThreads * kItems;

constexpr std::uint32_t kFourAbsent = kAbsent * 0x01010101u;

// A thread's documents.
struct Share {
  float score[kItems];              // -inf where no document is; later its exponential
  std::uint32_t level[kItems / 4];  // four a word

  __device__ bool has(int item, std::uint32_t four_times) const {
    return ((level[item / 4] ^ four_times) & (0xffu << item % 4 * 8)) == 0;
  }
  __device__ int level_of(int item) const { return level[item / 4] >> item % 4 * 8 & 0xff; }
  __device__ void drop_all() {
#pragma unroll
    for (int word = 0; word < kItems / 4; ++word) level[word] = kFourAbsent;
  }
};

// Up to kWarpColumns documents for a warp, of which `count` exist (none where it is negative). With vectors a lane
// takes neighbours, without them every 32nd: either way lanes read neighbouring addresses, at offsets known to the
// compiler.
template <typename Scalar>
__device__ Share load_share(const Scalar* scores, const std::uint8_t* index, int count, int lane, bool vectors) {
  constexpr int kPack = Pack<Scalar>::kSize;
  Share share;
  if (vectors) {
#pragma unroll
    for (int pack = 0; pack < kItems / kPack; ++pack) {
      const int first = (pack * kWarp + lane) * kPack;
      std::uint32_t* level = share.level + pack * (kPack / 4);
      uint4 bits = {};
      level[0] = level[kPack / 4 - 1] = kFourAbsent;
      if (first < count) {
        bits = __ldg(reinterpret_cast<const uint4*>(scores + first));
        if constexpr (kPack == 8) {
          const uint2 pair = __ldg(reinterpret_cast<const uint2*>(index + first));
          level[0] = pair.x;
          level[1] = pair.y;
        } else {
          level[0] = __ldg(reinterpret_cast<const std::uint32_t*>(index + first));
        }
      }
      Pack<Scalar> items;
      std::memcpy(&items, &bits, sizeof items);
#pragma unroll
      for (int item = 0; item < kPack; ++item) share.score[pack * kPack + item] = to_float(items.item[item]);
    }
  } else {
#pragma unroll
    for (int word = 0; word < kItems / 4; ++word) {
      share.level[word] = kFourAbsent;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int item = word * 4 + k, position = item * kWarp + lane;
        share.score[item] = 0;
        if (position < count) {
          share.score[item] = to_float(scores[position]);
          share.level[word] ^= (std::uint32_t{index[position]} ^ kAbsent) << k * 8;
        }
      }
    }
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    if (share.has(item, kFourAbsent)) share.score[item] = -INFINITY;
  }
  return share;
}

// Writes, where load_share read, score[item] * worth of its level, which lane l of the warp knows for level l; 0 where
// no document is.
template <typename Scalar>
__device__ void store_share(Scalar* gradient, int count, int lane, bool vectors, const Share& share, float worth) {
  constexpr int kPack = Pack<Scalar>::kSize;
#pragma unroll
  for (int pack = 0; pack < kItems / kPack; ++pack) {
    Pack<Scalar> items;
#pragma unroll
    for (int item = 0; item < kPack; ++item) {
      const int k = pack * kPack + item;
      const float value = share.score[k] * __shfl_sync(kAllLanes, worth, share.level_of(k) % kWarp);
      items.item[item] = from_float<Scalar>(share.has(k, kFourAbsent) ? 0.0f : value);
    }
    if (vectors) {
      const int first = (pack * kWarp + lane) * kPack;
      uint4 bits;
      std::memcpy(&bits, &items, sizeof bits);
      if (first < count) *reinterpret_cast<uint4*>(gradient + first) = bits;
    } else {
#pragma unroll
      for (int item = 0; item < kPack; ++item) {
        const int position = (pack * kPack + item) * kWarp + lane;
        if (position < count) gradient[position] = items.item[item];
      }
    }
  }
}

// The maximum of some scores and, in lane l, the sum of exp((score - top) / temperature) over those of level l.
struct Masses {
  float top, mass;
};

// The masses of a warp's shares; their scores become exponentials under `top`, at least as high as `floor`.
__device__ inline Masses sum_share(Share& share, int levels, float floor, float exponent, int lane) {
  float top = floor;
#pragma unroll
  for (int item = 0; item < kItems; ++item) top = fmaxf(top, share.score[item]);
  top = warp_max(top);
#pragma unroll
  for (int item = 0; item < kItems; ++item) share.score[item] = exp_below(share.score[item], top, exponent);

  // Four levels at a time: folding them into each other takes 6 shuffles where four reductions take 20.
  float mass = 0;
#pragma unroll 1
  for (int first = 0; first < levels; first += 4) {
    float sum[4] = {};
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (share.has(item, (first + k) * 0x01010101u)) sum[k] += share.score[item];
      }
    }
    const bool odd = lane & 1, high = lane & 2;
    const float low_pair = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(kAllLanes, odd ? sum[0] : sum[1], 1);
    const float high_pair = (odd ? sum[3] : sum[2]) + __shfl_xor_sync(kAllLanes, odd ? sum[2] : sum[3], 1);
    float total = (high ? high_pair : low_pair) + __shfl_xor_sync(kAllLanes, high ? low_pair : high_pair, 2);
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    if (lane / 4 * 4 == first) mass = total;
  }
  return {top, mass};
}

// The masses of up to 32 parts of a list, in the order of the parts whoever made them when.
__device__ inline Masses combine_parts(const float* tops, const float* masses, int parts, float exponent, int lane) {
  const float part_top = lane < parts ? tops[lane] : -INFINITY;
  const float top = warp_max(part_top);
  const float factor = exp_below(part_top, top, exponent);
  float mass = 0;
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    mass += __shfl_sync(kAllLanes, factor, part) * masses[part * kMaxLevels + lane];
  }
  return {top, mass};
}

// The masses of all warps of a block, in every warp.
__device__ inline Masses combine_warps(Masses own, float exponent, int lane, int warp) {
  __shared__ float tops[kMaxWarps];
  __shared__ float masses[kMaxWarps * kMaxLevels];
  masses[warp * kMaxLevels + lane] = own.mass;
  if (lane == 0) tops[warp] = own.top;
  __syncthreads();
  return combine_parts(tops, masses, blockDim.x / kWarp, exponent, lane);
}

struct Solution {
  float loss;
  float worth;  // in lane l: d loss / d (score / temperature) of a document of level l, by its exponential
  bool alive;   // there is predicted and target mass
};

// A list's table, level l in lane l, all 0 beyond its levels. Fetched before the scores, to be there when they are
// done.
struct Table {
  int levels;
  float grade, target;
};

template <typename Scalar>
__device__ Table load_table(const TypedLists<Scalar>& lists, std::int64_t row, int lane) {
  const int levels = lists.counts[row];
  const bool inside = lane < lists.width;  // asked first: the loads need not wait for the count
  const float grade = inside ? lists.values[row * lists.width + lane] : 0;
  const float target = inside ? lists.mass[row * lists.width + lane] : 0;
  return {levels, lane < levels ? grade : 0, lane < levels ? target : 0};
}

// Solves a list with `mass`, the sum of exponentials of level l, in lane l.
__device__ inline Solution solve_levels(float mass, const Table& table, int order, int lane) {
  const auto [levels, grade, target] = table;
  const float Z = warp_sum(mass), target_total = warp_sum(target);
  if (Z == 0 || target_total == 0) return {0, 0, false};

  const float P = mass / Z;
  float F = warp_scan_up(P, lane);
  const float G = warp_scan_up(target, lane);
  const float S = __shfl_down_sync(kAllLanes, warp_scan_down(P, lane), 1);  // mass above gap `lane`
  float gap = __shfl_down_sync(kAllLanes, grade, 1);
  const float middle = (grade + gap) / 2;
  gap = lane < levels - 1 ? gap - grade : 0;
  F = snap(F, G, kTolerance);

  float loss, t;
  if (order == 1) {
    loss = gap * fabsf(F - G);
    t = slope1(gap, F, G);
  } else {
    // W_2^2 = sum over gaps g_i^2 |F_i - G_i| + 2 sum over i < j g_i g_j ([F_i - G_j]+ + [G_i - F_j]+): nothing
    // cancels.
    float pairs = 0;
    int left = 0, right = 0;  // first level whose G reaches F, and exceeds it
#pragma unroll 1
    for (int other = 0; other < levels; ++other) {
      const float other_F = __shfl_sync(kAllLanes, F, other), other_G = __shfl_sync(kAllLanes, G, other);
      const float other_gap = __shfl_sync(kAllLanes, gap, other);
      if (lane < other) pairs += other_gap * (fmaxf(F - other_G, 0) + fmaxf(G - other_F, 0));
      left += other_G < F;
      right += other_G <= F;
    }
    loss = gap * (gap * fabsf(F - G) + 2 * pairs);
    const int last = kWarp - 1 - __clz(__ballot_sync(kAllLanes, target > 0));  // sums may stay below 1
    const float left_grade = __shfl_sync(kAllLanes, grade, left < last ? left : last);
    const float right_grade = __shfl_sync(kAllLanes, grade, right < last ? right : last);
    t = slope2(gap, (left_grade + right_grade) / 2, middle);
  }
  loss = warp_sum(loss);  // NaN if a mass is

  const float above = warp_scan_down(t * S, lane);
  const float below = __shfl_up_sync(kAllLanes, warp_scan_up(t * F, lane), 1);
  const float centred = above - (lane == 0 ? 0 : below);
  const float check = Z + target_total;  // comparisons with NaN hide it from the slopes
  return {loss, check == check ? centred / Z : check, true};
}

// Lists that stay in registers. With kOneWarp each warp of a block takes one list, else the block takes one; a thread
// holds up to kItems documents. Reads scores, levels and the list's table once; writes its loss and, unless null, its
// gradient. One barrier, none with kOneWarp.
template <typename Scalar, bool kOneWarp>
__global__ void __launch_bounds__(kOneWarp ? kListsPerBlock * kWarp : kMaxBlockThreads,
                                  kOneWarp ? kMaxBlockThreads / (kListsPerBlock * kWarp) : 1)
    transport_levels(const TypedLists<Scalar> lists) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t row = kOneWarp ? std::int64_t{blockIdx.x} * kListsPerBlock + warp : blockIdx.x;
  if (row >= lists.rows) return;
  const Table table = load_table(lists, row, lane);
  const int first = kOneWarp ? 0 : warp * kWarpColumns;
  const int count = static_cast<int>(lists.columns) - first;

  Share share = load_share(lists.scores_of(row) + first, lists.levels_of(row) + first, count, lane, lists.vectors);
  const Masses own = sum_share(share, table.levels, -INFINITY, lists.exponent, lane);
  const Masses all = kOneWarp ? own : combine_warps(own, lists.exponent, lane, warp);
  const Solution solution = solve_levels(all.mass, table, lists.order, lane);
  if (lane == 0 && first == 0) lists.loss[row] = solution.loss;
  if (lists.gradient == nullptr) return;

  if (!solution.alive) share.drop_all();  // NaN times 0 is not 0
  const float rescale = kOneWarp ? 1 : exp_below(own.top, all.top, lists.exponent);
  store_share(lists.gradient_of(row) + first, count, lane, lists.vectors, share,
              solution.worth * lists.scale * rescale);
}

// Documents begin .. end - 1 of a list, for a block to go through; begin is a multiple of 8, so that packs stay
// aligned.
struct Slice {
  std::int64_t row, begin, end;
};

// The masses of a warp's part of a slice.
template <typename Scalar>
__device__ Masses sum_slice(const TypedLists<Scalar>& lists, const Slice& slice, int levels, int lane, int warp) {
  const Scalar* scores = lists.scores_of(slice.row);
  const std::uint8_t* index = lists.levels_of(slice.row);
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
__device__ void write_slice(const TypedLists<Scalar>& lists, const Slice& slice, float top, const Solution& solution,
                            int lane, int warp) {
  const Scalar* scores = lists.scores_of(slice.row);
  const std::uint8_t* index = lists.levels_of(slice.row);
  Scalar* gradient = lists.gradient_of(slice.row);
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

// Many lists of any length: one block per list, which reads it twice. Writes as transport_levels does. One barrier.
template <typename Scalar>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_levels(const TypedLists<Scalar> lists) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Slice list = {blockIdx.x, 0, lists.columns};
  const Table table = load_table(lists, list.row, lane);
  const Masses own = sum_slice(lists, list, table.levels, lane, warp);
  const Masses all = combine_warps(own, lists.exponent, lane, warp);
  const Solution solution = solve_levels(all.mass, table, lists.order, lane);
  if (threadIdx.x == 0) lists.loss[list.row] = solution.loss;
  if (lists.gradient != nullptr) write_slice(lists, list, all.top, solution, lane, warp);
}

}  // namespace gradret::cuda
