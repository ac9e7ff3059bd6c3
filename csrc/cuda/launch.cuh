// SPDX-License-Identifier: Apache-2.0
// Launching kernels: errors become exceptions, the current device is restored, and the dimension
// becomes a template argument.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../poisson_field.h"

namespace pfgm {
namespace {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next launch must not report it again
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// Makes `device` the current one of this thread, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(former_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
};

inline void launch(void (*kernel)(FieldParams), dim3 grid, dim3 block, const FieldParams& params) {
  void* arguments[] = {const_cast<FieldParams*>(&params)};
  cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0,
                   static_cast<cudaStream_t>(params.stream));
  check(cudaGetLastError());
}

// Calls body with the smallest of kDims that holds dim, as a std::integral_constant.
template <int... kDims, class Body>
void switch_dim(int64_t dim, Body body) {
  const bool found = ((dim <= kDims && (body(std::integral_constant<int, kDims>()), true)) || ...);
  if (!found) throw std::invalid_argument("CUDA kernel called with a dimension out of range");
}

}  // namespace
}  // namespace pfgm
