// SPDX-License-Identifier: Apache-2.0
// What a test may ask of the emulator.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "emulator.h"

namespace emulation {

// order: forward, reverse or greedy; late: asynchronous copies deliver when they are waited for.
inline void set_schedule(const std::string& order, uint64_t seed, bool late) {
  if (order != "forward" && order != "reverse" && order != "greedy") {
    throw std::invalid_argument("order is forward, reverse or greedy, got " + order);
  }
  schedule.order = order == "forward"   ? Order::kForward
                   : order == "reverse" ? Order::kReverse
                                        : Order::kGreedy;
  schedule.random.seed(seed);
  schedule.late = late;
}

// How tensor cores sum (tensor_core.h).
inline void set_tensor_core(int terms, int places) { tensor_core = {terms, places}; }

// How often each kernel has run, by its offset in the module's file.
inline std::map<uintptr_t, long> launches() {
  std::map<uintptr_t, long> result;
  for (const auto& [kernel, count] : launched) {
    Dl_info info;
    dladdr(kernel, &info);
    result[reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase)] =
        count;
  }
  return result;
}

inline void define_controls(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0,
             py::arg("late") = false);
  module.def("set_tensor_core", &set_tensor_core);
  module.def("launches", &launches);
  module.def("set_multiprocessors", [](int count) { multiprocessors = count; });
}

}  // namespace emulation
