// The Python module gradret._kernels. Tensors come as addresses and sizes, so that no torch header is needed; the
// caller (gradret/loss/) has checked shapes, types and devices. The interpreter is free while a call computes.

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

// A number from Python on its way into a field: an address is one of anything, a code one of an enumeration.
struct Pointer {
  Address address;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};
struct Code {
  int code;
  template <typename T>
  operator T() const {
    return static_cast<T>(code);
  }
};
Pointer convert(Address address) { return {address}; }
Code convert(int code) { return {code}; }
template <typename T>
T convert(T number) {
  return number;
}

// A class of Python that is made from all fields of a struct, in their order.
template <typename Struct, typename... Fields>
void define_struct(py::module_& module, const char* name) {
  py::class_<Struct>(module, name).def(py::init([](Fields... fields) { return Struct{convert(fields)...}; }));
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  using namespace gradret;
  const auto define = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  module.attr("INTERFACE") = 5;  // what gradret/loss/kernels.py expects; raised when parameters or results change
  module.attr("MAX_SORT_COLUMNS") = kMaxSortColumns;

  define_struct<Grades, Address, bool, Address, Address, Size, Size, Address, Address, Address, Address, Address>(
      module, "Grades");
  define_struct<Lists, Address, int, Size, Size, Size, Address, bool, Address, Address, Address, Address, Size, int,
                double, double, double, double, double, Address, Address>(module, "Lists");
  define_struct<Tile, Address, Size, Size, Size, Size, Address, Address, Address, double, Address, Address, Address>(
      module, "Tile");

  define("instruction_set", &cpu::instruction_set);
  define("use_instruction_set", &cpu::use_instruction_set);
  define("mix_cpu", &cpu::mix);
  define("prepare_levels", &cpu::prepare_levels);
  define("fold_tile_cpu", &cpu::fold_tile);
  define("unfold_tile_cpu", &cpu::unfold_tile);
#ifdef GRADRET_CUDA
  module.attr("CUDA_ARCHITECTURES") = GRADRET_CUDA;
  define("scratch_bytes", &cuda::scratch_bytes);
  define("mix_cuda", &cuda::mix);
  define("sort_grades", [](Address grades, Address mask, Size rows, Size columns, Address index, Address values,
                           Address counts, int device, Address stream) {
    cuda::sort_grades(Pointer{grades}, Pointer{mask}, rows, columns, Pointer{index}, Pointer{values}, Pointer{counts},
                      device, stream);
  });
  define("fold_tile_cuda", &cuda::fold_tile);
  define("unfold_tile_cuda", &cuda::unfold_tile);
#else
  module.attr("CUDA_ARCHITECTURES") = "";
#endif
}
