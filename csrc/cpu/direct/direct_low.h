// SPDX-License-Identifier: Apache-2.0
// Forward in the plane and in space, with a small integer k: one loop over the references.
//
//   w ∝ R^(−k/2),  R = ‖x − x0‖² · inverse + shift = s · inverse
//
// As no logarithm is taken, any scale does that keeps floats in range, so that it is fixed by the
// first references; and k multiplies the rounding of R too little for the differences of R to be
// formed first (direct.h).
#pragma once

#include "direct.h"

namespace pfgm {
namespace {

constexpr int kMaxLowDim = 3, kMaxLowPower = 4;

inline bool is_low(const FieldParams& p) {
  const double k = 2 * p.half_k;
  return p.dim <= kMaxLowDim && k == ::floor(k) && k >= 1 && k <= kMaxLowPower;
}

struct LowScale {
  VecF inverse, shift;

  void fix(int i, double nearest, double offset) {
    inverse[i] = static_cast<float>(1 / (nearest + offset));
    shift[i] = static_cast<float>(offset * inverse[i]);
  }

  // R^(−k/2) · 2/k. A root y leaves e = 1 − R y², and (1 − e)^(−k/2) = 1 + (k/2) e to 5e-8 of a
  // root to 2⁻¹⁴; and with (k/2) (k/2 + 1)/2 e² to 2e-9 of any.
  template <int k>
  VecF weight(VecF distance) const {
    const VecF ratio = distance * inverse + shift;
    const VecF y = rough_reciprocal_root(ratio), square = y * y;
    const VecF power = k == 1 ? y : k == 2 ? square : k == 3 ? square * y : square * square;
    if constexpr (kRoughRoot <= 0x1p-14) return power * ((1.0f + 2.0f / k) - ratio * square);
    const VecF e = 1.0f - ratio * square;
    return power * (e * (e * (0.25f * k + 0.5f) + 1.0f) + 2.0f / k);
  }
};

// The sums of n ≤ kRun references from zero, and the smallest squared distance among them.
template <int kDim>
struct LowRun {
  VecF sums[kDim + 1] = {}, nearest = broadcast(INFINITY);  // at last, of the weights

  template <int k>
  void add(const float* row, int n, const VecF* x, const LowScale& scale) {
    for (int r = 0; r < n; ++r, row += kDim) {
      VecF difference[kDim], distance;
      for (int c = 0; c < kDim; ++c) {
        difference[c] = row[c] - x[c];
        const VecF square = difference[c] * difference[c];
        distance = c == 0 ? square : distance + square;
      }
      nearest = smaller(distance, nearest);
      const VecF w = scale.weight<k>(distance);
      sums[kDim] += w;
      for (int c = 0; c < kDim; ++c) sums[c] += w * difference[c];
    }
  }
};

// Calls task(Constant<dim>, Constant<k>).
template <class Task>
void dispatch_low(int64_t dim, int k, const Task& task) {
  const auto with_dim = [&](auto constant) {
    switch (k) {
      case 1:
        return task(constant, Constant<1>());
      case 2:
        return task(constant, Constant<2>());
      case 3:
        return task(constant, Constant<3>());
      default:
        return task(constant, Constant<kMaxLowPower>());
    }
  };
  switch (dim) {
    case 1:
      return with_dim(Constant<1>());
    case 2:
      return with_dim(Constant<2>());
    default:
      return with_dim(Constant<kMaxLowDim>());
  }
}

}  // namespace
}  // namespace pfgm
