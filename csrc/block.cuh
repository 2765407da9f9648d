// What the kernels are made of: lists with their types, reductions and scans of a warp and of a block. All sums are
// float32 and made in an order that depends on the launch alone, so that a kernel gives the same bits every time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace gradret::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLn2 = 0.6931472f;
constexpr float kTolerance = 8 * 1.1920929e-7f;  // of snap()

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

// Lists, as kernels take them.
template <typename Scalar>
struct TypedLists {
  const Scalar* scores;
  const void* index;
  const float* values;
  const float* mass;
  const float* share;
  const std::int32_t* counts;
  float* loss;
  Scalar* gradient;  // or null
  std::int64_t rows, columns, stride;
  int width, order;
  float exponent;  // log2(e) / temperature
  float scale;     // scale / temperature
  float transport, cross, contrast;
  bool vectors;  // 16-byte accesses are aligned in every row, and no pack reaches beyond a row

  __device__ const Scalar* scores_of(std::int64_t row) const { return scores + row * stride; }
  __device__ Scalar* gradient_of(std::int64_t row) const { return gradient + row * columns; }
  __device__ const std::uint8_t* levels_of(std::int64_t row) const {
    return static_cast<const std::uint8_t*>(index) + row * columns;
  }
  __device__ const std::int32_t* positions_of(std::int64_t row) const {
    return static_cast<const std::int32_t*>(index) + row * columns;
  }
};

template <typename Scalar>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(Scalar);
  Scalar item[kSize];
};

// exp((score - top) / temperature), `exponent` being log2(e) / temperature. The difference comes first: it is exact
// where it matters. A maximum over nothing, -inf, must not meet a score of -inf: their difference is NaN.
__device__ inline float exp_below(float score, float top, float exponent) {
  return exp2f((score - (top == -INFINITY ? 0.0f : top)) * exponent);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// NaN is left out: it shows in the sums.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Sum over this lane and those below it.
__device__ inline float warp_scan_up(float x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// Sum over this lane and those above it.
__device__ inline float warp_scan_down(float x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float above = __shfl_down_sync(kAllLanes, x, step);
    if (lane + step < kWarp) x += above;
  }
  return x;
}

// What the documents with target mass add to the cross-entropy and to the contrast: sums over them, each times its
// target mass, of that mass, of its logarithm less the score above `top`, and of the contrast's terms.
struct Pull {
  float mass = 0, score = 0, opposed = 0;

  template <typename Scalar>
  __device__ void add(const TypedLists<Scalar>& lists, float share, float score, float top, float term) {
    mass += share;
    this->score += share * (logf(share) - (score - top) * lists.exponent * kLn2);
    opposed += share * term;
  }

  // The loss of both terms; Z: the sum of all exponentials under `top`.
  template <typename Scalar>
  __device__ float loss(const TypedLists<Scalar>& lists, float Z) const {
    return mass == 0 ? 0 : lists.cross * (score / mass - logf(mass / Z)) + lists.contrast * opposed / mass;
  }
};

// What the warps of a block tell each other, double: a warp may be one exchange ahead of another, so that one barrier
// an exchange is enough.
struct BlockExchange {
  float warp[2][kWarp];
};

// Reduces and scans over a block, in the order of its threads. Every thread must call.
class Block {
 public:
  __device__ explicit Block(BlockExchange& exchange) : exchange_(exchange) {}

  __device__ float sum(float x) { return total(warp_sum(x)); }

  __device__ Pull sum(const Pull& pull) {
    return {sum(pull.mass), sum(pull.score), sum(pull.opposed)};
  }

  __device__ float max(float x) {
    const float* warps = publish(warp_max(x));
    return warp_max(lane() < count() ? warps[lane()] : -INFINITY);
  }

  // `before`: carry plus the sum over the threads before this one; `after`: with this one's x, too; carry becomes the
  // sum over all. With kMonotone, for x >= 0, `before` and `after` never decrease from thread to thread, and one
  // thread's `after` is the next one's `before`: sums in a tree do not grant that by themselves.
  template <bool kMonotone>
  __device__ void scan(float x, float& carry, float& before, float& after) {
    float inside = warp_scan_up(x, lane());
    if (kMonotone) {
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const float below = __shfl_up_sync(kAllLanes, inside, step);
        inside = below > inside ? below : inside;  // keeps NaN, as fmaxf does not
      }
    }
    const float previous = __shfl_up_sync(kAllLanes, inside, 1);
    const float* warps = publish(__shfl_sync(kAllLanes, inside, kWarp - 1));
    const int warp = threadIdx.x / kWarp;
    float base = 0;
#pragma unroll 1
    for (int other = 0; other < count(); ++other) {
      if (other == warp) base = carry;
      carry += warps[other];
    }
    before = lane() == 0 ? base : base + previous;
    after = base + inside;
  }

 private:
  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int count() { return blockDim.x / kWarp; }

  __device__ const float* publish(float of_warp) {
    float* warps = exchange_.warp[turn_];
    turn_ ^= 1;
    if (lane() == 0) warps[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    return warps;
  }

  __device__ float total(float of_warp) {
    const float* warps = publish(of_warp);
    return warp_sum(lane() < count() ? warps[lane()] : 0);
  }

  BlockExchange& exchange_;
  int turn_ = 0;
};

}  // namespace gradret::cuda
