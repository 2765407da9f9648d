// What pytest calls through ctypes: the functions of csrc/cuda.h under C names.
#include "cuda.h"

using gradret::Lists;
using gradret::Scalar;
using gradret::Tile;

extern "C" {
std::int64_t shim_scratch_bytes(const Lists* lists) { return gradret::cuda::transport_scratch_bytes(*lists); }
int shim_transport(const Lists* lists, void* scratch) { return gradret::cuda::transport(*lists, scratch, 0, nullptr); }
int shim_sort_grades(const float* grades, const std::uint8_t* mask, std::int64_t rows, std::int64_t columns,
                     std::int32_t* index, float* values, std::int32_t* counts) {
  return gradret::cuda::sort_grades(grades, mask, rows, columns, index, values, counts, 0, nullptr);
}
int shim_scale_gradient(void* gradient, int scalar, std::int64_t rows, std::int64_t columns, const float* factor,
                        bool by_row) {
  return gradret::cuda::scale_gradient(gradient, static_cast<Scalar>(scalar), rows, columns, factor, by_row, 0,
                                       nullptr);
}
int shim_fold_tile(const Tile* tile) { return gradret::cuda::fold_tile(*tile, 0, nullptr); }
int shim_unfold_tile(const Tile* tile) { return gradret::cuda::unfold_tile(*tile, 0, nullptr); }
}
