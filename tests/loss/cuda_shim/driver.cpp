// What pytest calls through ctypes: the functions of csrc/kernels.h for CUDA under C names. They return 0, or 1 with
// the error on stderr.
#include <cstdio>
#include <exception>

#include "kernels.h"

using namespace gradret;

template <typename Call>
int report(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

extern "C" {
std::int64_t shim_scratch_bytes(const Lists* lists) { return cuda::scratch_bytes(*lists); }
int shim_mix(const Lists* lists, std::uintptr_t scratch) {
  return report([&] { cuda::mix(*lists, scratch, 0, 0); });
}
int shim_sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                     std::int32_t* index, float* values, std::int32_t* counts) {
  return report([&] { cuda::sort_grades(grades, mask, rows, columns, index, values, counts, 0, 0); });
}
int shim_fold_tile(const Tile* tile) {
  return report([&] { cuda::fold_tile(*tile, 0, 0); });
}
int shim_unfold_tile(const Tile* tile) {
  return report([&] { cuda::unfold_tile(*tile, 0, 0); });
}
}
