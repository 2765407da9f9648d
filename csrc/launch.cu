// Host side of the kernels: chooses one, launches it on the caller's stream, waits for nothing.
#include <algorithm>

#include "cuda.h"
#include "levels.cuh"
#include "sort.cuh"
#include "sorted.cuh"
#include "stream.cuh"
#include "tiles.cuh"

namespace gradret::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::int64_t kManyRows = 128;  // lists enough to fill a large GPU with a block each

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool changed_ = false;
};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whole warps, enough for `count` threads and no more than `limit`.
int whole_warps(std::int64_t count, int limit) {
  return static_cast<int>(std::min<std::int64_t>(divide_up(std::max<std::int64_t>(count, 1), kWarp) * kWarp, limit));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();  // clears it, too
  return error != cudaSuccess ? error : last;
}

bool aligned(const void* pointer, std::int64_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// 1 / temperature as a factor: finite, so that a difference of 0 stays 0.
float finite(double x) { return static_cast<float>(std::clamp(x, -3.4028234e38, 3.4028234e38)); }

// Enough slices to keep every multiprocessor busy, none shorter than a tile.
int count_slices(const Lists& lists) {
  const std::int64_t wanted = divide_up(2 * kManyRows, std::max<std::int64_t>(lists.rows, 1));
  const std::int64_t tiles = divide_up(lists.columns, kStreamThreads * kItems);
  return static_cast<int>(std::min<std::int64_t>({wanted, tiles, kWarp}));
}

template <typename Scalar>
cudaError_t transport_levels_of(const Lists& in, void* scratch, void* stream) {
  constexpr int kPack = Pack<Scalar>::kSize;
  LevelLists<Scalar> lists = {};
  lists.scores = static_cast<const Scalar*>(in.scores);
  lists.index = static_cast<const std::uint8_t*>(in.index);
  lists.values = static_cast<const float*>(in.values);
  lists.mass = static_cast<const float*>(in.mass);
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
  lists.vectors = in.columns % kPack == 0 && in.stride % kPack == 0 && aligned(in.scores, 16) &&
                  aligned(in.index, kPack) && aligned(in.gradient, 16);

  if (in.columns <= kWarpColumns) {
    return launch(transport_levels<Scalar, true>, divide_up(in.rows, kListsPerBlock), kListsPerBlock * kWarp, stream,
                  lists);
  }
  if (in.columns <= kBlockColumns) {
    const int threads = whole_warps(divide_up(in.columns, kItems), kMaxBlockThreads);
    return launch(transport_levels<Scalar, false>, in.rows, threads, stream, lists);
  }
  if (in.rows >= kManyRows) return launch(stream_levels<Scalar>, in.rows, kStreamThreads, stream, lists);
  Slices slices = {};
  slices.count = count_slices(in);
  slices.columns = divide_up(divide_up(in.columns, slices.count), kWarpColumns) * kWarpColumns;
  slices.count = static_cast<int>(divide_up(in.columns, slices.columns));  // none is empty
  slices.tops = static_cast<float*>(scratch);
  slices.masses = slices.tops + in.rows * slices.count;
  const std::int64_t blocks = in.rows * slices.count;
  const cudaError_t error = launch(sum_slices<Scalar>, blocks, kStreamThreads, stream, lists, slices);
  return error != cudaSuccess ? error : launch(write_slices<Scalar>, blocks, kStreamThreads, stream, lists, slices);
}

int sorted_threads(const Lists& lists) { return whole_warps(divide_up(lists.columns, kRun), kSortedThreads); }

std::int64_t sorted_blocks(const Lists& lists) {
  return std::min(lists.rows, kSortedThreadsAtOnce / sorted_threads(lists));
}

template <typename Scalar>
cudaError_t transport_sorted_of(const Lists& in, void* scratch, void* stream) {
  SortedLists<Scalar> lists = {};
  lists.scores = static_cast<const Scalar*>(in.scores);
  lists.index = static_cast<const std::int32_t*>(in.index);
  lists.values = static_cast<const float*>(in.values);
  lists.mass = static_cast<const float*>(in.mass);
  lists.counts = in.counts;
  lists.scratch = static_cast<float*>(scratch);
  lists.loss = static_cast<float*>(in.loss);
  lists.gradient = static_cast<Scalar*>(in.gradient);
  lists.rows = in.rows;
  lists.columns = in.columns;
  lists.stride = in.stride;
  lists.order = in.order;
  lists.exponent = finite(kLog2E / in.temperature);
  lists.scale = finite(in.scale / in.temperature);
  return launch(transport_sorted<Scalar>, sorted_blocks(in), sorted_threads(in), stream, lists);
}

template <typename Scalar>
cudaError_t transport_of(const Lists& lists, void* scratch, void* stream) {
  return lists.sorted ? transport_sorted_of<Scalar>(lists, scratch, stream)
                      : transport_levels_of<Scalar>(lists, scratch, stream);
}

template <typename Scalar>
cudaError_t scale_gradient_of(void* gradient, std::int64_t rows, std::int64_t columns, const float* factor, bool by_row,
                              void* stream) {
  constexpr int kPack = Pack<Scalar>::kSize;
  if (!by_row) {  // one long row
    columns *= rows;
    rows = 1;
  }
  const std::int64_t blocks_per_row = divide_up(columns, kScaleThreads * kScaleItems);
  const bool vectors = aligned(gradient, 16) && columns % kPack == 0;
  return launch(vectors ? scale_rows<Scalar, kPack> : scale_rows<Scalar, 1>, rows * blocks_per_row, kScaleThreads,
                stream, static_cast<Scalar*>(gradient), columns, blocks_per_row, factor, by_row);
}

}  // namespace

std::int64_t transport_scratch_bytes(const Lists& lists) {
  if (!lists.sorted) {
    const bool sliced = lists.columns > kBlockColumns && lists.rows < kManyRows;
    const std::int64_t numbers = sliced ? lists.rows * count_slices(lists) * (1 + kMaxLevels) : 0;
    return numbers * static_cast<std::int64_t>(sizeof(float));
  }
  return sorted_blocks(lists) * kScratchArrays * lists.columns * static_cast<std::int64_t>(sizeof(float));
}

int transport(const Lists& lists, void* scratch, int device, void* stream) {
  if (lists.rows == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (lists.columns == 0) {
    return cudaMemsetAsync(lists.loss, 0, lists.rows * sizeof(float), static_cast<cudaStream_t>(stream));
  }
  switch (lists.scalar) {
    case Scalar::kFloat32:
      return transport_of<float>(lists, scratch, stream);
    case Scalar::kBFloat16:
      return transport_of<__nv_bfloat16>(lists, scratch, stream);
    case Scalar::kFloat16:
      return transport_of<__half>(lists, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                std::int32_t* index, float* values, std::int32_t* counts, int device, void* stream) {
  if (rows == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const int width = static_cast<int>(columns);
  if (columns <= 128 * 8) {
    return launch(sort_by_grade<128, 8>, rows, 128, stream, grades, mask, width, index, values, counts);
  }
  if (columns > kMaxSortColumns) return cudaErrorInvalidValue;
  return launch(sort_by_grade<512, kMaxSortColumns / 512>, rows, 512, stream, grades, mask, width, index, values,
                counts);
}

int scale_gradient(void* gradient, Scalar scalar, std::int64_t rows, std::int64_t columns, const float* factor,
                   bool by_row, int device, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  switch (scalar) {
    case Scalar::kFloat32:
      return scale_gradient_of<float>(gradient, rows, columns, factor, by_row, stream);
    case Scalar::kBFloat16:
      return scale_gradient_of<__nv_bfloat16>(gradient, rows, columns, factor, by_row, stream);
    case Scalar::kFloat16:
      return scale_gradient_of<__half>(gradient, rows, columns, factor, by_row, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int fold_tile(const Tile& tile, int device, void* stream) {
  if (tile.rows == 0 || tile.columns == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return launch(fold_rows, tile.rows, kFoldThreads, stream, tile, finite(kLog2E / tile.temperature));
}

int unfold_tile(const Tile& tile, int device, void* stream) {
  if (tile.rows == 0 || tile.columns == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return launch(unfold_rows, tile.rows, kFoldThreads, stream, tile, finite(kLog2E / tile.temperature));
}

}  // namespace gradret::cuda
