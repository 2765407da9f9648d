// Loss and gradient of lists with few distinct grades. They depend on the scores through one sum of exponentials per
// level, and sums over the documents with target mass: a list is read, reduced to at most 32 numbers, which a warp
// solves, and read again to write its gradient.
#pragma once

#include "block.cuh"

namespace gradret::cuda {

constexpr int kItems = 16;  // documents a thread holds in registers
constexpr std::int64_t kWarpColumns = kWarp * kItems;
template <bool kMixed>
constexpr int kLevelThreads = kMixed ? 512 : 768;  // of a block at most: more would leave a thread too few registers
constexpr int kMaxWarps = kLevelThreads<false> / kWarp;

constexpr std::uint32_t kFourAbsent = kAbsent * 0x01010101u;

// A thread's documents.
struct Share {
  float score[kItems];              // -inf where no document is; later its exponential
  std::uint32_t level[kItems / 4];  // four a word

  __device__ bool has(int item, std::uint32_t four_times) const {
    return ((level[item / 4] ^ four_times) & (0xffu << item % 4 * 8)) == 0;
  }
  __device__ int level_of(int item) const { return level[item / 4] >> item % 4 * 8 & 0xff; }
  // What lane l knows of level l; anything of no document.
  __device__ float look_up(float of_lane, int item) const {
    return __shfl_sync(kAllLanes, of_lane, level_of(item) % kWarp);
  }
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
      const float value = share.score[k] * share.look_up(worth, k);
      from_float(share.has(k, kFourAbsent) ? 0.0f : value, items.item[item]);
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

// In lane l: a warp's documents of level l reduced, each with its value; `none` where there are none.
template <typename Reduce>
__device__ float reduce_levels(const Share& share, const float* values, int levels, float none, int lane,
                               Reduce reduce) {
  float found = none;
  const auto with = [&](float x, float other, int step) { return reduce(x, __shfl_xor_sync(kAllLanes, other, step)); };
  // Four levels at a time: folding them into each other takes 6 shuffles where four reductions take 20.
#pragma unroll 1
  for (int first = 0; first < levels; first += 4) {
    float part[4] = {none, none, none, none};
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (share.has(item, (first + k) * 0x01010101u)) part[k] = reduce(part[k], values[item]);
      }
    }
    const bool odd = lane & 1, high = lane & 2;
    const float low_pair = with(odd ? part[1] : part[0], odd ? part[0] : part[1], 1);
    const float high_pair = with(odd ? part[3] : part[2], odd ? part[2] : part[3], 1);
    float total = with(high ? high_pair : low_pair, high ? low_pair : high_pair, 2);
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) total = with(total, total, step);
    if (lane / 4 * 4 == first) found = total;
  }
  return found;
}

struct Add {
  __device__ float operator()(float x, float y) const { return x + y; }
};
struct Highest {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// In lane l: the highest score of level l, or with one top of all levels, and the sum over level l of exp((score - top)
// / temperature).
struct Masses {
  float top, mass;
};

// The masses of a warp's shares and those `before`; the scores become exponentials under their top. contrasts: whether
// each level has a top of its own.
template <bool kMixed>
__device__ Masses sum_share(Share& share, int levels, const Masses& before, bool contrasts, float exponent, int lane) {
  float top = -INFINITY;
  if (kMixed && contrasts) {
    top = reduce_levels(share, share.score, levels, -INFINITY, lane, Highest());
  } else {
#pragma unroll
    for (int item = 0; item < kItems; ++item) top = fmaxf(top, share.score[item]);
    top = warp_max(top);
  }
  top = fmaxf(before.top, top);
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    share.score[item] = exp_below(share.score[item], kMixed ? share.look_up(top, item) : top, exponent);
  }
  const float before_mass = before.mass * exp_below(before.top, top, exponent);
  return {top, before_mass + reduce_levels(share, share.score, levels, 0, lane, Add())};
}

// In lane l: the masses of all levels below l together.
__device__ inline Masses sum_below(const Masses& of_levels, int levels, float exponent, int lane) {
  Masses below = {-INFINITY, 0};
#pragma unroll 1
  for (int other = 0; other < levels - 1; ++other) {
    const float top = __shfl_sync(kAllLanes, of_levels.top, other);
    const float mass = __shfl_sync(kAllLanes, of_levels.mass, other);
    if (lane <= other) continue;
    const float higher = fmaxf(below.top, top);
    below.mass = below.mass * exp_below(below.top, higher, exponent) + mass * exp_below(top, higher, exponent);
    below.top = higher;
  }
  return below;
}

// The masses of all warps of a block, in every warp, summed in the order of the warps.
__device__ inline Masses combine_warps(const Masses& own, float exponent, int lane, int warp) {
  __shared__ float tops[kMaxWarps][kMaxLevels], masses[kMaxWarps][kMaxLevels];
  masses[warp][lane] = own.mass;
  tops[warp][lane] = own.top;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  Masses all = {-INFINITY, 0};
#pragma unroll 4
  for (int other = 0; other < warps; ++other) all.top = fmaxf(all.top, tops[other][lane]);
#pragma unroll 4
  for (int other = 0; other < warps; ++other) {
    all.mass += exp_below(tops[other][lane], all.top, exponent) * masses[other][lane];
  }
  return all;
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
  float grade, target, share;
};

template <typename Scalar>
__device__ Table load_table(const TypedLists<Scalar>& lists, std::int64_t row, int lane) {
  const int levels = lists.counts[row];
  const auto load = [&](const float* of_levels) {
    const float number = lane < lists.width ? of_levels[row * lists.width + lane] : 0;  // need not wait for the count
    return lane < levels ? number : 0;
  };
  return {levels, load(lists.values), load(lists.mass), load(lists.share)};
}

// Solves a list with `mass`, the sum of exponentials of level l, in lane l.
__device__ inline Solution solve_levels(float mass, const Table& table, int order, int lane) {
  const auto [levels, grade, target, share] = table;
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

// Lists of any length: one block per list, which reads scores and levels twice, or with kMixed, where there is more
// than the transport, three times, but for the first time from its cache. Writes the list's loss and, unless null, its
// gradient. One barrier; five with kMixed.
template <typename Scalar, bool kMixed>
__global__ void __launch_bounds__(kLevelThreads<kMixed>, 1) mix_levels(const TypedLists<Scalar> lists) {
  __shared__ BlockExchange exchange;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t row = blockIdx.x, step = std::int64_t{blockDim.x} * kItems;  // each warp its part of every tile
  const std::int64_t last = (lists.columns - 1) / step * step;
  // body(share, its first document, how many documents from there) of this warp's shares, from the end where the ones
  // before ended: there the last tiles read still lie in the cache.
  const auto each_share = [&](bool backward, auto body) {
    for (std::int64_t done = 0; done <= last; done += step) {
      const std::int64_t start = (backward ? last - done : done) + warp * kWarpColumns;
      const int count = static_cast<int>(min(lists.columns - start, kWarpColumns));
      if (count <= 0) continue;
      body(load_share(lists.scores_of(row) + start, lists.levels_of(row) + start, count, lane, lists.vectors), start,
           count);
    }
  };
  const Table table = load_table(lists, row, lane);
  const bool contrasts = kMixed && lists.contrast != 0;
  Masses own = {-INFINITY, 0};
  each_share(false, [&](Share share, std::int64_t, int) {
    own = sum_share<kMixed>(share, table.levels, own, contrasts, lists.exponent, lane);
  });
  const Masses all = combine_warps(own, lists.exponent, lane, warp);
  const float top = kMixed ? warp_max(all.top) : all.top, lowered = exp_below(all.top, top, lists.exponent);
  const Solution solution = solve_levels(all.mass * lowered, table, lists.order, lane);
  float worth = lists.transport * solution.worth, loss = lists.transport * solution.loss;

  const Masses below = contrasts ? sum_below(all, table.levels, lists.exponent, lane) : Masses{-INFINITY, 0};
  const float rival = log2f(below.mass);
  // A document's term in the contrast, without its mass. All lanes must call.
  const auto oppose_item = [&](const Share& share, int item) {
    const float above = share.score[item] - share.look_up(below.top, item);
    return oppose((above * lists.exponent - share.look_up(rival, item)) * kLn2);
  };
  Pull pull;
  if constexpr (kMixed) {
    float slopes = 0;  // in lane l: the sum over level l of mass * slope
    each_share(true, [&](const Share& share, std::int64_t, int) {
      float slope[kItems];
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const float mass = share.look_up(table.share, item), score = share.score[item];
        const Opposed<float> term = oppose_item(share, item);
        const bool pulls = mass > 0 && score != -INFINITY;
        slope[item] = pulls ? mass * term.slope : 0;
        if (pulls) pull.add(lists, mass, score, top, term.loss);
      }
      if (contrasts) slopes += reduce_levels(share, slope, table.levels, 0, lane, Add());
    });
    Block block(exchange);
    pull = block.sum(pull);
    if (contrasts) slopes = combine_warps({0, slopes}, lists.exponent, lane, warp).mass;
    const float Z = warp_sum(all.mass * lowered);
    if (solution.alive) loss += pull.loss(lists, Z);
    if (pull.mass != 0) worth += lists.cross / Z;
    worth *= lowered;
    const float push = slopes != 0 ? lists.contrast * slopes / (pull.mass * below.mass) : 0;
#pragma unroll 1
    for (int other = 1; contrasts && other < table.levels; ++other) {
      const float of_other = __shfl_sync(kAllLanes, push, other);
      const float other_top = __shfl_sync(kAllLanes, below.top, other);
      if (lane < other && of_other != 0) worth += of_other * exp_below(all.top, other_top, lists.exponent);
    }
  }
  if (threadIdx.x == 0) lists.loss[row] = loss;
  if (lists.gradient == nullptr) return;

  each_share(!kMixed, [&](Share share, std::int64_t start, int count) {
    if (!solution.alive) share.drop_all();
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const float score = share.score[item], slope = kMixed ? oppose_item(share, item).slope : 0;
      share.score[item] = exp_below(score, kMixed ? share.look_up(all.top, item) : top, lists.exponent);
      if constexpr (kMixed) {
        share.score[item] *= share.look_up(worth, item);
        const float mass = share.look_up(table.share, item);
        if (!(mass > 0) || score == -INFINITY) continue;
        share.score[item] -= mass / pull.mass * (lists.cross + lists.contrast * slope);
      }
    }
    store_share(lists.gradient_of(row) + start, count, lane, lists.vectors, share,
                kMixed ? lists.scale : worth * lists.scale);
  });
}

}  // namespace gradret::cuda
