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

PFGM_HOST_DEVICE double reciprocal_root(double v) {
#if defined(__CUDA_ARCH__)
  return ::rsqrt(v);
#else
  return 1 / ::sqrt(v);
#endif
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

// One query's running sums over references by direct differences, for small d: what one thread of
// the CUDA kernel does. Columns beyond d are zero up to kDim. kPower: k is an integer, and the
// weights are powers, (nearest / s)^(k/2), which cost less than a logarithm and an exponential.
//
// Everything is in double. A logit's error is k/2 times the relative error of s; and float logits
// near −log N, where a crowd of references outweighs the nearest one, are off by up to 1e-6 each,
// all in the same direction where the references are equal.
template <int kDim, bool kPower>
struct DirectSum {
  // References that are weighed together, for instruction-level parallelism while registers last.
  static constexpr int kGroup = kDim <= 2 ? 4 : kDim <= 8 ? 2 : 1;
  // Doubles from one reference to the next: threads that read different ones avoid bank conflicts.
  static constexpr int kStride = kDim < 4 ? kDim : kDim + 2;

  RadialKernel kernel;
  OnlineState state;
  double offset;  // what t adds to s
  double scale;   // kPower: √nearest; otherwise 1/nearest, and 1/(2t²) for the Gaussian kernel
  int64_t anchor = 0;
  double x[kDim] = {};
  double displacement[kDim] = {};

  PFGM_HOST_DEVICE DirectSum(double half_k, double t)
      : kernel(half_k, t),
        offset(kernel.s_offset(t)),
        scale(kernel.gaussian ? kernel.inverse_two_t2 : 0) {}

  // Adds every shares-th group of a tile of `count` references, starting with group `share`.
  // `first` is the index of the tile's first reference.
  PFGM_HOST_DEVICE void add_tile(const double* tile, int count, int64_t first, int share,
                                 int shares) {
    int row = share * kGroup;
    for (; row + kGroup <= count; row += shares * kGroup) {
      add<kGroup>(tile + row * kStride, first + row);
    }
    const int end = row + kGroup < count ? row + kGroup : count;
    for (; row < end; ++row) add<1>(tile + row * kStride, first + row);
  }

 private:
  template <int kRows>
  PFGM_HOST_DEVICE void add(const double* rows, int64_t index) {
    double s[kRows], weights[kRows];
    double smallest = state.nearest;
    int nearest_row = -1;
    PFGM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      s[r] = offset;
      PFGM_UNROLL
      for (int c = 0; c < kDim; ++c) {
        const double difference = rows[r * kStride + c] - x[c];
        s[r] += difference * difference;
      }
      s[r] += s[r] - s[r];  // an infinite s becomes NaN: it must not pass for a small weight
      if (s[r] < smallest) {
        smallest = s[r];
        nearest_row = r;
      }
    }
    if (nearest_row >= 0) move_to(smallest, index + nearest_row);
    weigh(s, weights);
    PFGM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      state.sum += weights[r];
      PFGM_UNROLL
      for (int c = 0; c < kDim; ++c) displacement[c] += weights[r] * (rows[r * kStride + c] - x[c]);
    }
  }

  PFGM_HOST_DEVICE void move_to(double nearest, int64_t index) {
    const double factor = state.update(nearest, kernel);
    anchor = index;
    if (!kernel.gaussian) scale = kPower ? ::sqrt(nearest) : 1 / nearest;
    PFGM_UNROLL
    for (int c = 0; c < kDim; ++c) displacement[c] *= factor;
  }

  // Weights relative to the nearest: 1 for the nearest itself, also where it coincides with the
  // query.
  template <int kRows>
  PFGM_HOST_DEVICE void weigh(const double (&s)[kRows], double (&weights)[kRows]) const {
    if constexpr (kPower) {
      double power[kRows];  // (nearest / s)^(n/2) for n = 1, 2, 4, …
      PFGM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        weights[r] = 1;
        power[r] = s[r] == state.nearest ? 1 : scale * reciprocal_root(s[r]);
      }
      for (int k = static_cast<int>(2 * kernel.half_k); k > 0; k /= 2) {
        PFGM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (k % 2 == 1) weights[r] *= power[r];
          power[r] *= power[r];
        }
      }
    } else {
      PFGM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const double u = s[r] == state.nearest ? 0 : (s[r] - state.nearest) * scale;
        weights[r] = ::exp(kernel.gaussian ? -u : -kernel.half_k * ::log1p(u));
      }
    }
  }
};

}  // namespace
}  // namespace pfgm
