// SPDX-License-Identifier: Apache-2.0
// Mathematics in float, and the bfloat16 parts of floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../field_math.h"

namespace pfgm {
namespace {

// log(1 + u) to about one unit in the last place, for 0 ≥ u > −1 or u ≤ 1e30.
//
// The hardware's logarithm is off by 2⁻²² absolutely, which a logit multiplies by (d + D)/2. Here
// 1 + u = 2^e (1 + f) with |f| ≤ 0.42, what the sum lost is put back, and log(1 + f) is a series.
__device__ inline float log1p_float(float u) {
  const float w = 1.0f + u;
  const float lost = u - (w - 1.0f);
  const uint32_t bits = __float_as_uint(w);
  const uint32_t high = (bits - 0x3F3504F3u) & 0xFF800000u;  // exponent << 23
  const float unit = __uint_as_float(0x3F800000u - high);    // 2^−exponent
  const float f = (__uint_as_float(bits - high) - 1.0f) + lost * unit;
  const float e = static_cast<float>(static_cast<int32_t>(high)) * 1.1920928955078125e-07f;
  float series = -0.07646101489f * f + 0.12779113629f;
  series = series * f - 0.13164186427f;
  series = series * f + 0.14199695852f;
  series = series * f - 0.16622764905f;
  series = series * f + 0.20001292692f;
  series = series * f - 0.25000837961f;
  series = series * f + 0.33333331197f;
  const float tail = (f * f) * (f * series - 0.5f) + e * -2.12194440e-4f;
  return e * 0.693359375f + (f + tail);
}

// Relative logit of u = (s_j − s_a)/s_a (Gaussian: (s_j − s_a)/(2t²), half_k = 1). correction makes
// up for the rounding of k/2 and, to first order, of what scaled u: either would move all logits
// the same way.
__device__ inline float logit_float(float u, float half_k, float correction, bool gaussian) {
  const float log = gaussian ? u : log1p_float(u);
  return -(log * half_k) - log * correction;
}

// v rounded to the nearest bfloat16, ties to even.
__device__ inline uint16_t to_bfloat16(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (!(v == v)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

__device__ inline float from_bfloat16(uint16_t v) {
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}

}  // namespace
}  // namespace pfgm
