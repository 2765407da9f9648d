// Host side of the kernels: chooses one, launches it on the caller's stream, waits for nothing.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "levels.cuh"
#include "sorted.cuh"
#include "tiles.cuh"

namespace gradret::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::int64_t kFloatBytes = sizeof(float);

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gradret's CUDA kernels: ") + cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_;
};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whole warps, enough for `count` threads and no more than `limit`.
int whole_warps(std::int64_t count, int limit) {
  return static_cast<int>(std::min<std::int64_t>(divide_up(std::max<std::int64_t>(count, 1), kWarp) * kWarp, limit));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::uintptr_t stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();  // clears it, too
  check(error);
  check(last);
}

bool aligned(const void* pointer, std::int64_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// 1 / temperature as a factor: finite, so that a difference of 0 stays 0.
float finite(double x) { return static_cast<float>(std::clamp(x, -3.4028234e38, 3.4028234e38)); }

template <typename Scalar>
TypedLists<Scalar> type_lists(const Lists& in) {
  constexpr int kPack = Pack<Scalar>::kSize;
  TypedLists<Scalar> lists = {};
  lists.scores = static_cast<const Scalar*>(in.scores);
  lists.index = in.index;
  lists.values = static_cast<const float*>(in.values);
  lists.mass = static_cast<const float*>(in.mass);
  lists.share = static_cast<const float*>(in.share);
  lists.counts = in.counts;
  lists.loss = static_cast<float*>(in.loss);
  lists.gradient = static_cast<Scalar*>(in.gradient);
  lists.rows = in.rows;
  lists.columns = in.columns;
  lists.stride = in.stride;
  lists.width = static_cast<int>(in.width);
  lists.order = in.order;
  lists.exponent = finite(kLog2E / in.temperature);
  lists.scale = finite(in.scale / in.temperature);
  lists.transport = static_cast<float>(in.transport);
  lists.cross = static_cast<float>(in.cross);
  lists.contrast = static_cast<float>(in.contrast);
  lists.vectors = in.columns % kPack == 0 && in.stride % kPack == 0 && aligned(in.scores, 16) &&
                  aligned(in.index, kPack) && aligned(in.gradient, 16);
  return lists;
}

int sorted_threads(const Lists& lists) { return whole_warps(divide_up(lists.columns, kRun), kSortedThreads); }

std::int64_t sorted_blocks(const Lists& lists) {
  return std::min(lists.rows, kSortedThreadsAtOnce / sorted_threads(lists));
}

template <typename Scalar>
void mix_as(const Lists& in, float* scratch, std::uintptr_t stream) {
  const TypedLists<Scalar> lists = type_lists<Scalar>(in);
  if (in.sorted) {
    if (in.contrast != 0) return check(cudaErrorInvalidValue);
    launch(mix_sorted<Scalar>, sorted_blocks(in), sorted_threads(in), stream, lists, scratch);
  } else {
    const bool mixed = in.cross != 0 || in.contrast != 0;
    const int threads = whole_warps(divide_up(in.columns, kItems), mixed ? kLevelThreads<true> : kLevelThreads<false>);
    launch(mixed ? mix_levels<Scalar, true> : mix_levels<Scalar, false>, in.rows, threads, stream, lists);
  }
}

}  // namespace

std::int64_t scratch_bytes(const Lists& lists) {
  return lists.sorted ? sorted_blocks(lists) * kScratchArrays * lists.columns * kFloatBytes : 0;
}

void mix(const Lists& lists, std::uintptr_t scratch, int device, std::uintptr_t stream) {
  if (lists.rows == 0) return;
  const DeviceGuard guard(device);
  if (lists.columns == 0) {
    return check(cudaMemsetAsync(lists.loss, 0, lists.rows * kFloatBytes, reinterpret_cast<cudaStream_t>(stream)));
  }
  float* const floats = reinterpret_cast<float*>(scratch);
  switch (lists.scalar) {
    case Scalar::kFloat32:
      return mix_as<float>(lists, floats, stream);
    case Scalar::kBFloat16:
      return mix_as<__nv_bfloat16>(lists, floats, stream);
    case Scalar::kFloat16:
      return mix_as<__half>(lists, floats, stream);
    default:
      return check(cudaErrorInvalidValue);
  }
}

void sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                 std::int32_t* index, float* values, std::int32_t* counts, int device, std::uintptr_t stream) {
  if (rows == 0) return;
  if (columns > kMaxSortColumns) return check(cudaErrorInvalidValue);
  const DeviceGuard guard(device);
  const auto sort = [&](auto kernel, int threads) {
    launch(kernel, rows, threads, stream, grades, mask, static_cast<int>(columns), index, values, counts);
  };
  if (columns <= 128 * 8) {
    sort(sort_by_grade<128, 8>, 128);
  } else {
    sort(sort_by_grade<512, kMaxSortColumns / 512>, 512);
  }
}

void fold_tile(const Tile& tile, int device, std::uintptr_t stream) {
  if (tile.rows == 0 || tile.columns == 0) return;
  const DeviceGuard guard(device);
  launch(fold_rows, tile.rows, kFoldThreads, stream, tile, finite(kLog2E / tile.temperature));
}

void unfold_tile(const Tile& tile, int device, std::uintptr_t stream) {
  if (tile.rows == 0 || tile.columns == 0) return;
  const DeviceGuard guard(device);
  launch(unfold_rows, tile.rows, kFoldThreads, stream, tile, finite(kLog2E / tile.temperature));
}

}  // namespace gradret::cuda
