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

#if defined(__CUDACC__)
#define PFGM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PFGM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pfgm {
namespace {

// log(s / nearest) and exp for scalars; the CPU kernels have a vector twin (cpu/simd.h).
struct ScalarMath {
  template <class Real>
  PFGM_HOST_DEVICE static Real log_ratio(Real s, Real nearest) {
    return ::log1p((s - nearest) / nearest);
  }
  template <class Real>
  PFGM_HOST_DEVICE static Real exp(Real v) {
    return ::exp(v);
  }
};

// The radial kernel of one query.
template <class Real>
struct RadialKernel {
  Real half_k;
  Real inverse_two_t2;  // 1/(2t²), Gaussian kernel only
  bool gaussian;

  RadialKernel() = default;
  PFGM_HOST_DEVICE RadialKernel(Real half_k, Real t)
      : half_k(half_k), inverse_two_t2(Real(0.5) / (t * t)), gaussian(half_k == Real(INFINITY)) {}

  // What t adds to ‖x − x0‖² in s.
  PFGM_HOST_DEVICE Real s_offset(Real t) const { return gaussian ? Real(0) : t * t; }

  // Logit of a reference at s minus that of one at nearest > 0. Value is Real or a vector of it.
  template <class Math, class Value>
  PFGM_HOST_DEVICE Value relative_logit(Value s, Value nearest) const {
    return gaussian ? (nearest - s) * inverse_two_t2 : Math::log_ratio(s, nearest) * -half_k;
  }

  // exp(relative_logit) for scalars, with the singular point: references that coincide with the
  // query (nearest = 0) share all the weight.
  PFGM_HOST_DEVICE Real relative_weight(Real s, Real nearest) const {
    if (!gaussian && nearest == Real(0)) return s == Real(0) ? Real(1) : s - s;
    return ScalarMath::exp(relative_logit<ScalarMath>(s, nearest));
  }

  PFGM_HOST_DEVICE double logit(double s) const {
    return gaussian ? -s * double(inverse_two_t2) : -double(half_k) * ::log(s);
  }
};

// Running state of the sum over references: the nearest s so far, and the sum of the weights
// relative to it. The accumulated displacements live beside it and scale by the same factors.
template <class Real>
struct OnlineState {
  Real nearest = Real(INFINITY);
  Real sum = Real(0);

  // Admits references whose smallest s is `s`. Returns the factor that takes what was accumulated
  // so far to the new nearest (1 where it stays).
  PFGM_HOST_DEVICE Real update(Real s, const RadialKernel<Real>& kernel) {
    if (!(s < nearest)) return Real(1);
    const Real factor = sum == Real(0) ? Real(0) : kernel.relative_weight(nearest, s);
    nearest = s;
    sum *= factor;
    return factor;
  }
};

}  // namespace
}  // namespace pfgm
