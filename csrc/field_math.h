// SPDX-License-Identifier: Apache-2.0
// The mathematics of the field that the CPU and CUDA kernels share.
//
//   s_j = ‖x − x0_j‖² + t²,  logit_j = −(k/2) log s_j            (Eqs. 3 and 12, k = d + D)
//   s_j = ‖x − x0_j‖²,       logit_j = −s_j / (2t²)              (k = ∞, the Gaussian kernel)
//
// Logits are only ever formed relative to the nearest reference: (k/2) log s itself does not fit
// into a float, and barely into a double. And they are formed of squared distances q = ‖x − x0‖²,
// of which t² takes no digits before it cancels:
//
//   logit_j − logit_a = −(k/2) log1p((q_j − q_a)/s_a)
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

// log N, of a million at least: these may be a chunk of a call's references, whose weights are cut
// as all of them together would have them cut.
PFGM_HOST_DEVICE double log_count(const FieldParams& p) {
  return ::log(static_cast<double>(p.count < 1 << 20 ? 1 << 20 : p.count));
}

// For scalars; the CPU kernels have a vector twin (cpu/common/simd.h).
struct ScalarMath {
  PFGM_HOST_DEVICE static double log1p(double u) { return ::log1p(u); }
};

// The radial kernel of one query, of squared distances ‖x − x0‖².
struct RadialKernel {
  double half_k;
  double inverse_two_t2;  // 1/(2t²), Gaussian kernel only
  bool gaussian;
  // What t adds to a squared distance in s. For the Gaussian kernel that is nothing, or NaN where t
  // is zero or not finite.
  double offset;

  RadialKernel() = default;
  PFGM_HOST_DEVICE RadialKernel(double half_k, double t)
      : half_k(half_k),
        inverse_two_t2(0.5 / (t * t)),
        gaussian(half_k == INFINITY),
        offset(gaussian ? (t - t) * inverse_two_t2 : t * t) {}

  // The squared distance, or NaN where s is infinite: it must not pass for a small weight. Value is
  // double or a vector of it.
  template <class Value>
  PFGM_HOST_DEVICE Value checked(Value square) const {
    const Value s = square + offset;
    return square + (s - s);
  }

  // Whether a reference at this squared distance coincides with the query at t = 0.
  PFGM_HOST_DEVICE bool singular(double square) const {
    return !gaussian && square + offset == 0.0;
  }

  // u, of which the relative logit is −(k/2) log1p(u); for the Gaussian kernel −u.
  template <class Value>
  PFGM_HOST_DEVICE Value argument(Value square, Value nearest) const {
    return gaussian ? (square - nearest) * inverse_two_t2 : (square - nearest) / (nearest + offset);
  }

  // Logit of a reference minus that of the nearest, which is not singular.
  template <class Math, class Value>
  PFGM_HOST_DEVICE Value relative_logit(Value square, Value nearest) const {
    const Value u = argument(square, nearest);
    return gaussian ? -u : Math::log1p(u) * -half_k;
  }

  // exp(relative_logit) for scalars. At the singular point the references that coincide with the
  // query share all the weight.
  PFGM_HOST_DEVICE double relative_weight(double square, double nearest) const {
    if (singular(nearest)) return singular(square) ? 1.0 : square - square;
    return ::exp(relative_logit<ScalarMath>(square, nearest));
  }

  // The squared distance at which the relative logit is −depth.
  PFGM_HOST_DEVICE double farthest(double nearest, double depth) const {
    const double more =
        gaussian ? depth / inverse_two_t2 : (nearest + offset) * ::expm1(depth / half_k);
    return nearest + more;
  }

  // What a squared distance takes off the logit as it grows, per unit.
  PFGM_HOST_DEVICE double slope(double square) const {
    return gaussian ? inverse_two_t2 : half_k / (square + offset);
  }

  PFGM_HOST_DEVICE double logit(double square) const {
    return gaussian ? -square * inverse_two_t2 : -half_k * ::log(square + offset);
  }
};

// Running state of the sum over references: the smallest squared distance so far, and the sum of
// the weights relative to it. The accumulated displacements live beside it and scale by the same
// factors.
struct OnlineState {
  double nearest = INFINITY;
  double sum = 0.0;

  // Admits references of which the nearest is at `square`. Returns the factor that takes what was
  // accumulated so far to the new nearest (1 where it stays).
  PFGM_HOST_DEVICE double update(double square, const RadialKernel& kernel) {
    if (!(square < nearest)) return 1.0;
    const double factor = sum == 0.0 ? 0.0 : kernel.relative_weight(nearest, square);
    nearest = square;
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

// What a field is (v, −t) times, of norm n (Eq. 12).
PFGM_HOST_DEVICE double field_factor(const FieldParams& p, double norm) {
  return norm == 0 ? 0 : p.scale / (norm + p.gamma);
}

// From the cotangents (a, b) of a result to that of v, g = factor · (a − along · v), and to what
// reaches t not by way of the weights. Of a field g = f · (a − u (u·(a, b)) n/(n + gamma)), n the
// norm of (v, −t), u = (v, −t)/n and f = scale/(n + gamma).
struct ResultCotangent {
  double factor, along;

  // square: ‖v‖²; product: a·v. Both are zero at the singular point.
  PFGM_HOST_DEVICE ResultCotangent(const FieldParams& p, double t, bool singular, double square,
                                   double product, double b)
      : factor(singular ? 0 : 1), along(0) {
    if (p.output != Output::kField) return;
    const double norm = ::hypot(::sqrt(square), t);
    if (!singular) factor = field_factor(p, norm);
    if (norm != 0) along = (product - b * t) / norm / (norm + p.gamma);
  }

  PFGM_HOST_DEVICE double of_v(double a, double v) const {
    return factor == 0 ? 0 : factor * (a - along * v);
  }
  PFGM_HOST_DEVICE double of_t(const FieldParams& p, double b, double t) const {
    return p.output == Output::kField ? -factor * (b + t * along) : 0;
  }
};

}  // namespace
}  // namespace pfgm
