// SPDX-License-Identifier: Apache-2.0
// Keyword arguments of Python into FieldParams.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "poisson_field.h"

namespace pfgm {
namespace {

namespace py = pybind11;

template <class T>
void set(const py::handle& value, T& field) {
  field = value.cast<T>();
}

template <class T>
void set(const py::handle& value, T*& field) {
  field = reinterpret_cast<T*>(value.cast<std::uintptr_t>());
}

void set(const py::handle& value, ValueType& field) {
  const auto name = value.cast<std::string>();
  if (name == "float32") {
    field = ValueType::kFloat32;
  } else if (name == "float64") {
    field = ValueType::kFloat64;
  } else if (name == "uint8") {
    field = ValueType::kUint8;
  } else {
    throw std::invalid_argument("values expect float32, float64 or uint8, got " + name);
  }
}

void set(const py::handle& value, Output& field) {
  const auto name = value.cast<std::string>();
  field = name == "field" ? Output::kField : name == "mean" ? Output::kMean : Output::kDisplacement;
}

FieldParams parse(const py::kwargs& arguments) {
  FieldParams p{};
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
    PFGM_FIELD(ranges)
    PFGM_FIELD(values)
    PFGM_FIELD(table)
    PFGM_FIELD(value_type)
    PFGM_FIELD(single)
    PFGM_FIELD(x_single)
    PFGM_FIELD(norms)
    PFGM_FIELD(codes)
    PFGM_FIELD(grid)
    PFGM_FIELD(sketches[0].dim)
    PFGM_FIELD(sketches[0].basis)
    PFGM_FIELD(sketches[0].points)
    PFGM_FIELD(sketches[0].rest)
    PFGM_FIELD(sketches[0].unit)
    PFGM_FIELD(sketches[0].residual)
    PFGM_FIELD(sketches[0].reach)
    PFGM_FIELD(sketches[1].dim)
    PFGM_FIELD(sketches[1].basis)
    PFGM_FIELD(sketches[1].points)
    PFGM_FIELD(sketches[1].rest)
    PFGM_FIELD(sketches[1].unit)
    PFGM_FIELD(sketches[1].residual)
    PFGM_FIELD(sketches[1].reach)
    PFGM_FIELD(header)
    PFGM_FIELD(origin)
    PFGM_FIELD(mean)
    PFGM_FIELD(squares)
    PFGM_FIELD(parts)
    PFGM_FIELD(plane)
    PFGM_FIELD(num_parts)
    PFGM_FIELD(crowd)
    PFGM_FIELD(workspace)
    PFGM_FIELD(displacement)
    PFGM_FIELD(anchor)
    PFGM_FIELD(log_mass)
    PFGM_FIELD(anchor_log_weight)
    PFGM_FIELD(anchor_square)
    PFGM_FIELD(grad_displacement)
    PFGM_FIELD(projection)
    PFGM_FIELD(grad_log_mass)
    PFGM_FIELD(tilt)
    PFGM_FIELD(dx)
    PFGM_FIELD(dt)
    PFGM_FIELD(dvalues)
    PFGM_FIELD(output)
    PFGM_FIELD(gamma)
    PFGM_FIELD(scale)
    PFGM_FIELD(result_single)
    PFGM_FIELD(result)
    PFGM_FIELD(residual)
    PFGM_FIELD(launches)
    PFGM_FIELD(num_threads)
    PFGM_FIELD(device)
    PFGM_FIELD(stream)
#undef PFGM_FIELD
    throw py::type_error("the extension has no parameter " + name);
  }
  return p;
}

template <auto entry>
void define(py::module_& module, const char* name) {
  module.def(name, [](const py::kwargs& arguments) {
    const FieldParams params = parse(arguments);
    py::gil_scoped_release release;
    return entry(params);
  });
}

}  // namespace
}  // namespace pfgm
