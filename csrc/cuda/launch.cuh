// SPDX-License-Identifier: Apache-2.0
// Launching kernels: one function, errors become exceptions, the current device is restored, and
// memory is shared out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../poisson_field.h"

namespace pfgm {

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

// Hands out pieces of p.workspace, or where that is null counts what they take. A pass is written
// once and run twice: counting, it launches nothing.
class Workspace {
 public:
  explicit Workspace(const FieldParams& p) : base_(static_cast<char*>(p.workspace)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = bytes_, end = begin + count * static_cast<int64_t>(sizeof(T));
    bytes_ = (end / kAlignment + 1) * kAlignment;  // behind each piece lies a gap
    if (base_ == nullptr) return nullptr;
#if !defined(__CUDACC__)
    emulation::guard(base_ + end, bytes_ - end);
#endif
    return reinterpret_cast<T*>(base_ + begin);
  }

  bool counting() const { return base_ == nullptr; }
  // Never 0: memory of no bytes would have no address.
  int64_t bytes() const { return bytes_ + kAlignment; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* base_;
  int64_t bytes_ = 0;
};

// A kernel takes one struct, `arguments`, whose member p is the call's FieldParams.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
            const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("CUDA kernel called with more blocks than a grid has");
  }
  if (arguments.p.workspace == nullptr) {
    if (arguments.p.launches != nullptr) ++*arguments.p.launches;
    return;
  }
  constexpr size_t kStaticLimit = 48 << 10;
  if (shared_bytes > kStaticLimit) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers,
                         shared_bytes, static_cast<cudaStream_t>(arguments.p.stream)));
}

// Calls body with the smallest of kDims that holds dim, as a std::integral_constant.
template <int... kDims, class Body>
void switch_dim(int64_t dim, Body body) {
  const bool found = ((dim <= kDims && (body(std::integral_constant<int, kDims>()), true)) || ...);
  if (!found) throw std::invalid_argument("CUDA kernel called with a dimension out of range");
}

inline int multiprocessors(const FieldParams& p) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, p.device));
  return count;
}

inline int64_t divide_up(int64_t total, int64_t size) { return (total + size - 1) / size; }

}  // namespace pfgm
