// The Python module gradret._kernels. Tensors come as addresses and sizes, so that no torch header is needed; the
// caller (gradret/ops.py) has checked shapes, types and devices. The interpreter is free while a call computes.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu.h"
#ifdef GRADRET_CUDA
#include <cuda_runtime_api.h>

#include "cuda.h"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;

// The parameters of make_lists and make_tile below.
#define GRADRET_LISTS                                                                                                  \
  Address, int, std::int64_t, std::int64_t, std::int64_t, Address, bool, Address, Address, Address, std::int64_t, int, \
      double, double, Address, Address
#define GRADRET_TILE                                                                                           \
  Address, std::int64_t, std::int64_t, std::int64_t, std::int64_t, Address, Address, Address, double, Address, \
      Address, Address

namespace gradret {
namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef GRADRET_CUDA
void check(int code, const char* what) {
  if (code != 0)
    throw std::runtime_error(std::string("gradret: ") + what + ": " +
                             cudaGetErrorString(static_cast<cudaError_t>(code)));
}
#endif

Lists make_lists(Address scores, int scalar, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                 Address index, bool sorted, Address values, Address mass, Address counts, std::int64_t width,
                 int order, double temperature, double scale, Address loss, Address gradient) {
  return {at<void>(scores),
          static_cast<Scalar>(scalar),
          rows,
          columns,
          stride,
          at<void>(index),
          sorted,
          at<void>(values),
          at<void>(mass),
          at<std::int32_t>(counts),
          width,
          order,
          temperature,
          scale,
          at<void>(loss),
          at<void>(gradient)};
}

template <typename... Rest>
void transport_cpu(int threads, double reduced, Rest... rest) {
  const Lists lists = make_lists(rest...);
  py::gil_scoped_release free;
  if (!cpu::transport(lists, reduced, threads)) throw std::bad_alloc();
}

bool prepare_levels(int threads, Address grades, int grade, Address mask, Address weights, int targets,
                    std::int64_t rows, std::int64_t columns, Address values, Address mass, Address counts,
                    Address levels) {
  py::gil_scoped_release free;
  return cpu::prepare_levels({at<void>(grades), static_cast<cpu::Grade>(grade), at<std::uint8_t>(mask),
                              at<double>(weights), static_cast<cpu::Targets>(targets), rows, columns,
                              at<double>(values), at<double>(mass), at<std::int32_t>(counts)},
                             at<std::uint8_t>(levels), threads);
}

void prepare_sorted(int threads, Address grades, int grade, Address mask, Address weights, int targets,
                    std::int64_t rows, std::int64_t columns, Address values, Address mass, Address counts,
                    Address index) {
  py::gil_scoped_release free;
  cpu::prepare_sorted({at<void>(grades), static_cast<cpu::Grade>(grade), at<std::uint8_t>(mask), at<double>(weights),
                       static_cast<cpu::Targets>(targets), rows, columns, at<double>(values), at<double>(mass),
                       at<std::int32_t>(counts)},
                      at<std::int32_t>(index), threads);
}

Tile make_tile(Address scores, std::int64_t rows, std::int64_t columns, std::int64_t stride, std::int64_t first_column,
               Address pair_offsets, Address pair_columns, Address pair_values, double temperature, Address top,
               Address sum, Address weight) {
  return {at<float>(scores),
          rows,
          columns,
          stride,
          first_column,
          at<std::int64_t>(pair_offsets),
          at<std::int32_t>(pair_columns),
          at<float>(pair_values),
          temperature,
          at<float>(top),
          at<double>(sum),
          at<float>(weight)};
}

template <typename... Rest>
void fold_tile_cpu(int threads, Rest... rest) {
  const Tile tile = make_tile(rest...);
  py::gil_scoped_release free;
  cpu::fold_tile(tile, threads);
}

template <typename... Rest>
void unfold_tile_cpu(int threads, Rest... rest) {
  const Tile tile = make_tile(rest...);
  py::gil_scoped_release free;
  cpu::unfold_tile(tile, threads);
}

#ifdef GRADRET_CUDA
template <typename... Rest>
std::int64_t transport_scratch_bytes(Rest... rest) {
  return cuda::transport_scratch_bytes(make_lists(rest...));
}

template <typename... Rest>
void transport_cuda(int device, Address stream, Address scratch, Rest... rest) {
  const Lists lists = make_lists(rest...);
  py::gil_scoped_release free;
  check(cuda::transport(lists, at<void>(scratch), device, at<void>(stream)), "transport");
}

void sort_grades(int device, Address stream, Address grades, Address mask, std::int64_t rows, std::int64_t columns,
                 Address index, Address values, Address counts) {
  py::gil_scoped_release free;
  check(cuda::sort_grades(at<float>(grades), at<std::uint8_t>(mask), rows, columns, at<std::int32_t>(index),
                          at<float>(values), at<std::int32_t>(counts), device, at<void>(stream)),
        "sort_grades");
}

void scale_gradient(int device, Address stream, Address gradient, int scalar, std::int64_t rows, std::int64_t columns,
                    Address factor, bool by_row) {
  py::gil_scoped_release free;
  check(cuda::scale_gradient(at<void>(gradient), static_cast<Scalar>(scalar), rows, columns, at<float>(factor), by_row,
                             device, at<void>(stream)),
        "scale_gradient");
}

template <typename... Rest>
void fold_tile_cuda(int device, Address stream, Rest... rest) {
  const Tile tile = make_tile(rest...);
  py::gil_scoped_release free;
  check(cuda::fold_tile(tile, device, at<void>(stream)), "fold_tile");
}

template <typename... Rest>
void unfold_tile_cuda(int device, Address stream, Rest... rest) {
  const Tile tile = make_tile(rest...);
  py::gil_scoped_release free;
  check(cuda::unfold_tile(tile, device, at<void>(stream)), "unfold_tile");
}
#endif

}  // namespace
}  // namespace gradret

PYBIND11_MODULE(_kernels, module) {
  using namespace gradret;
  module.attr("INTERFACE") = 2;  // what gradret/kernels.py expects; raised when a function's parameters change
  module.attr("MAX_SORT_COLUMNS") = kMaxSortColumns;
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set);
  module.def("transport_cpu", &transport_cpu<GRADRET_LISTS>);
  module.def("prepare_levels", &prepare_levels);
  module.def("prepare_sorted", &prepare_sorted);
  module.def("fold_tile_cpu", &fold_tile_cpu<GRADRET_TILE>);
  module.def("unfold_tile_cpu", &unfold_tile_cpu<GRADRET_TILE>);
#ifdef GRADRET_CUDA
  module.attr("CUDA_ARCHITECTURES") = GRADRET_CUDA;
  module.def("transport_scratch_bytes", &transport_scratch_bytes<GRADRET_LISTS>);
  module.def("transport_cuda", &transport_cuda<GRADRET_LISTS>);
  module.def("sort_grades", &sort_grades);
  module.def("scale_gradient", &scale_gradient);
  module.def("fold_tile_cuda", &fold_tile_cuda<GRADRET_TILE>);
  module.def("unfold_tile_cuda", &unfold_tile_cuda<GRADRET_TILE>);
#else
  module.attr("CUDA_ARCHITECTURES") = "";
#endif
}
