// SPDX-License-Identifier: Apache-2.0
// The entry points: which pass takes a call.
#include <limits>

#include "passes.cuh"

namespace pfgm {
namespace {

void check_params(const FieldParams& p) {
  constexpr int64_t kMostColumns = std::numeric_limits<int>::max();
  if (p.batch < 0 || p.count < 1 || p.dim < 1 || p.dim > kMostColumns || !(p.half_k > 0)) {
    throw std::invalid_argument("CUDA kernel called with sizes out of range");
  }
  if (!(p.single ? p.x_single != nullptr : p.x != nullptr) || !p.t || !p.values ||
      (p.value_type == ValueType::kUint8 && !p.table)) {
    throw std::invalid_argument("CUDA kernel called with a null pointer");
  }
  const bool prepared = p.header && p.origin && p.mean && p.squares && p.parts;
  if (p.single && !(p.dim > kMaxDirectDim ? prepared && p.num_parts >= 1 : p.crowd != nullptr)) {
    throw std::invalid_argument("CUDA kernel called without operands");
  }
}

}  // namespace

int64_t field_forward_cuda(const FieldParams& p) {
  if (p.batch == 0) return 0;  // torch gives no addresses of empty tensors
  check_params(p);
  if (!p.displacement || !p.anchor || !p.log_mass || !p.anchor_log_weight) {
    throw std::invalid_argument("CUDA kernel called with a null pointer");
  }
  const DeviceGuard guard(p.device);
  Workspace workspace(p);
  if (!p.single || p.ranges != nullptr) {
    exact_forward(p, workspace, all_references(p, workspace), {}, workspace.take<double>(p.batch));
  } else if (p.dim <= kMaxDirectDim) {
    direct_forward(p, workspace);
  } else {
    two_pass_forward(p, workspace);
  }
  return workspace.bytes();
}

int64_t field_backward_cuda(const FieldParams& p) {
  if (p.batch == 0) return 0;  // torch gives no addresses of empty tensors
  check_params(p);
  if (!p.anchor_square || !p.anchor_log_weight || !p.grad_displacement || !p.projection ||
      !p.grad_log_mass || !p.dx || !p.dt) {
    throw std::invalid_argument("CUDA kernel called with a null pointer");
  }
  const DeviceGuard guard(p.device);
  Workspace workspace(p);
  if (!p.single || p.ranges != nullptr || p.dvalues != nullptr) {
    exact_backward(p, workspace, all_references(p, workspace), nullptr);
  } else if (p.dim <= kMaxDirectDim) {
    direct_backward(p, workspace);
  } else {
    two_pass_backward(p, workspace);
  }
  return workspace.bytes();
}

const char* cuda_unavailable() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no driver is installed";
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace pfgm
