// SPDX-License-Identifier: Apache-2.0
// The threads of a warp together.
#pragma once

#include <cuda_runtime.h>

namespace pfgm {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Σ v over each `lanes` neighbours, a power of two, the same in all of them; the whole warp calls.
__device__ inline double warp_sum(double v, int lanes = kWarp) {
  for (int other = lanes / 2; other > 0; other /= 2) v += __shfl_xor_sync(kAllLanes, v, other);
  return v;
}

}  // namespace
}  // namespace pfgm
