// Enough of CUDA to run kernels on the CPU: every thread of a block is a fiber, blocks run one after another. Barriers
// and shuffles are where fibers take turns; the thread sanitizer sees each fiber as a thread, ordered by barriers
// alone.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace shim {

struct Indices {
  dim3 thread, block, threads, blocks;
};
const Indices& indices();

// threadIdx and its kin: .x is looked up when it is read.
template <dim3 Indices::* kWhich>
struct Index {
  struct X {
    operator unsigned() const { return (indices().*kWhich).x; }
  } x;
};

void run(dim3 blocks, dim3 threads, const std::function<void()>& body);
void sync_block(const char* file, int line);
void sync_warp();
int count_block(int predicate, const char* file, int line);
// The word that lane `source` of the warp gave in the same call; every lane must take part.
std::uint64_t exchange(std::uint64_t word, int source);
unsigned ballot(bool predicate);
int lane();

template <typename T>
T exchange_as(T value, int source) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(word, source);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace shim

inline constexpr shim::Index<&shim::Indices::thread> threadIdx;
inline constexpr shim::Index<&shim::Indices::block> blockIdx;
inline constexpr shim::Index<&shim::Indices::threads> blockDim;
inline constexpr shim::Index<&shim::Indices::blocks> gridDim;
#define __syncthreads() shim::sync_block(__FILE__, __LINE__)
#define __syncthreads_count(predicate) shim::count_block(predicate, __FILE__, __LINE__)
#define __syncwarp() shim::sync_warp()

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return shim::exchange_as(value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return shim::exchange_as(value, shim::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  return shim::exchange_as(value, shim::lane() < step ? shim::lane() : shim::lane() - step);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return shim::exchange_as(value, shim::lane() + step > 31 ? shim::lane() : shim::lane() + step);
}
inline unsigned __ballot_sync(unsigned, bool predicate) { return shim::ballot(predicate); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  shim::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
