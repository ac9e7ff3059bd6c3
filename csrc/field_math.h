// SPDX-License-Identifier: Apache-2.0
// The mathematics of the field that the CPU and CUDA kernels share.
//
//   s_j = ‖x − x0_j‖² + t²,  logit_j = −(k/2) log s_j            (Eqs. 3 and 12, k = d + D)
//   s_j = ‖x − x0_j‖²,       logit_j = −s_j / (2t²)              (k = ∞, the Gaussian kernel)
//
// Logits are only ever formed relative to the nearest reference: (k/2) log s itself does not fit
// into a float, and barely into a double.
#pragma once

#include <cmath>

#include "poisson_field.h"

#if defined(__CUDACC__)
#define PFGM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PFGM_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Arrays that live in registers need every index known; four loads on their way hide more latency
// than one.
#if defined(__CUDA_ARCH__)
#define PFGM_UNROLL _Pragma("unroll")
#define PFGM_UNROLL_BY_FOUR _Pragma("unroll 4")
#else
#define PFGM_UNROLL
#define PFGM_UNROLL_BY_FOUR
#endif

namespace pfgm {
namespace {

// Element `index` of the stored references.
PFGM_HOST_DEVICE double decode(const FieldParams& p, int64_t index) {
  switch (p.value_type) {
    case ValueType::kFloat32:
      return static_cast<const float*>(p.values)[index];
    case ValueType::kFloat64:
      return static_cast<const double*>(p.values)[index];
    default:
      return p.table[static_cast<const uint8_t*>(p.values)[index]];
  }
}

// log(s / nearest) and exp for scalars; the CPU kernels have a vector twin (cpu/simd.h).
struct ScalarMath {
  PFGM_HOST_DEVICE static double log_ratio(double s, double nearest) {
    return ::log1p((s - nearest) / nearest);
  }
  PFGM_HOST_DEVICE static double exp(double v) { return ::exp(v); }
};

// The radial kernel of one query.
struct RadialKernel {
  double half_k;
  double inverse_two_t2;  // 1/(2t²), Gaussian kernel only
  bool gaussian;

  RadialKernel() = default;
  PFGM_HOST_DEVICE RadialKernel(double half_k, double t)
      : half_k(half_k), inverse_two_t2(0.5 / (t * t)), gaussian(half_k == INFINITY) {}

  // What t adds to ‖x − x0‖² in s. For the Gaussian kernel that is nothing, or NaN where t is zero
  // or not finite.
  PFGM_HOST_DEVICE double s_offset(double t) const {
    return gaussian ? (t - t) * inverse_two_t2 : t * t;
  }

  // Logit of a reference at s minus that of one at nearest > 0. Value is double or a vector of it.
  template <class Math, class Value>
  PFGM_HOST_DEVICE Value relative_logit(Value s, Value nearest) const {
    return gaussian ? (nearest - s) * inverse_two_t2 : Math::log_ratio(s, nearest) * -half_k;
  }

  // exp(relative_logit) for scalars, with the singular point: references that coincide with the
  // query (nearest = 0) share all the weight.
  PFGM_HOST_DEVICE double relative_weight(double s, double nearest) const {
    if (!gaussian && nearest == 0.0) return s == 0.0 ? 1.0 : s - s;
    return ScalarMath::exp(relative_logit<ScalarMath>(s, nearest));
  }

  PFGM_HOST_DEVICE double logit(double s) const {
    return gaussian ? -s * inverse_two_t2 : -half_k * ::log(s);
  }
};

// Running state of the sum over references: the nearest s so far, and the sum of the weights
// relative to it. The accumulated displacements live beside it and scale by the same factors.
struct OnlineState {
  double nearest = INFINITY;
  double sum = 0.0;

  // Admits references whose smallest s is `s`. Returns the factor that takes what was accumulated
  // so far to the new nearest (1 where it stays).
  PFGM_HOST_DEVICE double update(double s, const RadialKernel& kernel) {
    if (!(s < nearest)) return 1.0;
    const double factor = sum == 0.0 ? 0.0 : kernel.relative_weight(nearest, s);
    nearest = s;
    sum *= factor;
    return factor;
  }

  // Adds the state of other references. What was accumulated so far scales by `own`, what was
  // accumulated beside `other` by `theirs`.
  struct Factors {
    double own, theirs;
  };
  PFGM_HOST_DEVICE Factors merge(const OnlineState& other, const RadialKernel& kernel) {
    if (other.sum == 0.0) return {1, 0};  // no reference was admitted there
    const double own = update(other.nearest, kernel);
    const double theirs = kernel.relative_weight(other.nearest, nearest);
    sum += theirs * other.sum;
    return {own, theirs};
  }
};

}  // namespace
}  // namespace pfgm
