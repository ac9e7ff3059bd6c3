// SPDX-License-Identifier: Apache-2.0
// The Python module _C: keyword arguments into FieldParams. Nothing else here knows Python.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "poisson_field.h"

namespace py = pybind11;

namespace {

template <class T>
void set(const py::handle& value, T& field) {
  field = value.cast<T>();
}

template <class T>
void set(const py::handle& value, T*& field) {
  field = reinterpret_cast<T*>(value.cast<std::uintptr_t>());
}

void set(const py::handle& value, pfgm::ValueType& field) {
  const auto name = value.cast<std::string>();
  if (name == "float32") {
    field = pfgm::ValueType::kFloat32;
  } else if (name == "float64") {
    field = pfgm::ValueType::kFloat64;
  } else if (name == "uint8") {
    field = pfgm::ValueType::kUint8;
  } else {
    throw std::invalid_argument("values expect float32, float64 or uint8, got " + name);
  }
}

pfgm::FieldParams parse(const py::kwargs& arguments) {
  pfgm::FieldParams p{};
  for (const auto& [key, value] : arguments) {
    const auto name = key.cast<std::string>();
#define PFGM_FIELD(field) \
  if (name == #field) {   \
    set(value, p.field);  \
    continue;             \
  }
    PFGM_FIELD(batch)
    PFGM_FIELD(count)
    PFGM_FIELD(dim)
    PFGM_FIELD(half_k)
    PFGM_FIELD(x)
    PFGM_FIELD(t)
    PFGM_FIELD(values)
    PFGM_FIELD(table)
    PFGM_FIELD(value_type)
    PFGM_FIELD(single)
    PFGM_FIELD(norms)
    PFGM_FIELD(codes)
    PFGM_FIELD(grid)
    PFGM_FIELD(num_splits)
    PFGM_FIELD(displacement)
    PFGM_FIELD(nearest)
    PFGM_FIELD(sum)
    PFGM_FIELD(anchor)
    PFGM_FIELD(log_mass)
    PFGM_FIELD(anchor_log_weight)
    PFGM_FIELD(anchor_s)
    PFGM_FIELD(grad_displacement)
    PFGM_FIELD(projection)
    PFGM_FIELD(grad_log_mass)
    PFGM_FIELD(dx)
    PFGM_FIELD(dt)
    PFGM_FIELD(dvalues)
    PFGM_FIELD(num_threads)
    PFGM_FIELD(device)
    PFGM_FIELD(stream)
#undef PFGM_FIELD
    throw py::type_error("the extension has no parameter " + name);
  }
  return p;
}

template <void (*entry)(const pfgm::FieldParams&)>
void define(py::module_& module, const char* name) {
  module.def(name, [](const py::kwargs& arguments) {
    const pfgm::FieldParams params = parse(arguments);
    py::gil_scoped_release release;
    entry(params);
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  define<pfgm::field_forward_cpu>(module, "field_forward_cpu");
  define<pfgm::field_backward_queries_cpu>(module, "field_backward_queries_cpu");
  define<pfgm::field_backward_references_cpu>(module, "field_backward_references_cpu");
  define<pfgm::prepare_references_cpu>(module, "prepare_references_cpu");
  module.def("use_instruction_set", pfgm::use_instruction_set);
#ifdef PFGM_CUDA_ARCHS
  define<pfgm::field_forward_cuda>(module, "field_forward_cuda");
  module.def("cuda_unavailable", pfgm::cuda_unavailable);
#endif
  module.def("build_info", [] {
    py::dict info;
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "g++ " __VERSION__;
#endif
    info["instruction set"] = pfgm::instruction_set();
#ifdef PFGM_CUDA_ARCHS
    info["CUDA"] = PFGM_CUDA_VERSION;
    info["architectures"] = PFGM_CUDA_ARCHS;
#else
    info["CUDA"] = "none";
#endif
    return info;
  });
}
