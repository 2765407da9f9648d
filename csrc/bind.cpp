// The Python module gradret._kernels. Tensors come as addresses and sizes, so that no torch header is needed; the
// caller (gradret/loss/) has checked shapes, types and devices. The interpreter is free while a call computes.

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  using namespace gradret;
  const auto define = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  module.attr("INTERFACE") = 3;  // what gradret/loss/kernels.py expects; raised when a function's parameters change
  module.attr("MAX_SORT_COLUMNS") = kMaxSortColumns;

  py::class_<Grades>(module, "Grades")
      .def(py::init([](Address grades, int grade, Address mask, Address weights, int targets, Size rows, Size columns,
                       Address index, Address values, Address mass, Address counts) {
        return Grades{at<void>(grades),
                      static_cast<Grade>(grade),
                      at<std::uint8_t>(mask),
                      at<double>(weights),
                      static_cast<Targets>(targets),
                      rows,
                      columns,
                      at<void>(index),
                      at<double>(values),
                      at<double>(mass),
                      at<std::int32_t>(counts)};
      }));
  py::class_<Lists>(module, "Lists")
      .def(py::init([](Address scores, int scalar, Size rows, Size columns, Size stride, Address index, bool sorted,
                       Address values, Address mass, Address counts, Size width, int order, double temperature,
                       double scale, Address loss, Address gradient) {
        return Lists{at<void>(scores),
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
      }));
  py::class_<Tile>(module, "Tile")
      .def(py::init([](Address scores, Size rows, Size columns, Size stride, Size first_column, Address pair_offsets,
                       Address pair_columns, Address pair_values, double temperature, Address top, Address sum,
                       Address weight) {
        return Tile{at<float>(scores),
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
      }));

  define("instruction_set", &cpu::instruction_set);
  define("use_instruction_set", &cpu::use_instruction_set);
  define("transport_cpu", &cpu::transport);
  define("prepare_levels", &cpu::prepare_levels);
  define("prepare_sorted", &cpu::prepare_sorted);
  define("fold_tile_cpu", &cpu::fold_tile);
  define("unfold_tile_cpu", &cpu::unfold_tile);
#ifdef GRADRET_CUDA
  module.attr("CUDA_ARCHITECTURES") = GRADRET_CUDA;
  define("transport_scratch_bytes", &cuda::transport_scratch_bytes);
  define("transport_cuda", &cuda::transport);
  define("sort_grades", [](Address grades, Address mask, Size rows, Size columns, Address index, Address values,
                           Address counts, int device, Address stream) {
    cuda::sort_grades(at<float>(grades), at<std::uint8_t>(mask), rows, columns, at<std::int32_t>(index),
                      at<float>(values), at<std::int32_t>(counts), device, stream);
  });
  define("fold_tile_cuda", &cuda::fold_tile);
  define("unfold_tile_cuda", &cuda::unfold_tile);
#else
  module.attr("CUDA_ARCHITECTURES") = "";
#endif
}
