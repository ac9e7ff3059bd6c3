// SPDX-License-Identifier: Apache-2.0
// Functions of vectors, in double and in float.
#pragma once

#include <cmath>

#include "vectors.h"

namespace pfgm {
namespace {

// One instruction each; b where either is NaN.
inline VecF smaller(VecF a, VecF b) { return a < b ? a : b; }
inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }

inline double reduce_add(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 · 2^52: adding it rounds to an integer
constexpr double kLn2High = 6.93147180369123816490e-01;  // ln 2 to 33 bits: n · kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;   // ln 2 − kLn2High

// log(1 + u) of u > −1 to about two units in the last place, also for small u; NaN stays NaN.
// w = 1 + u loses u − (w − 1), which is put back after the exponent is taken off:
// log(1 + z) = 2 artanh f, f = z/(2 + z), z on [√½ − 1, √2 − 1], |f| ≤ 0.1716, whose series
// converges in 11 terms.
inline Vec log1p(Vec u) {
  u = u > 1e300 ? broadcast(1e300) : u;  // of infinity `lost` would be NaN
  const Vec w = 1.0 + u;
  const Vec lost = u - (w - 1.0);
  const VecInt bits = (VecInt)w;
  const VecInt exponent = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
  const VecInt high = exponent << 52;
  const Vec unit = (Vec)((VecInt)broadcast(1.0) - high);  // 2^−exponent
  const Vec z = ((Vec)(bits - high) - 1.0) + lost * unit;
  const Vec e = (Vec)(exponent + (VecInt)broadcast(kRoundMagic)) - kRoundMagic;
  const Vec f = z / (z + 2.0);
  const Vec f2 = f * f;
  Vec series = broadcast(1.0 / 21);
#pragma GCC unroll 10
  for (int n = 19; n >= 1; n -= 2) series = series * f2 + 1.0 / n;
  return e * kLn2High + (2.0 * f * series + e * kLn2Low);
}

// exp of v ≤ ~1 to about one unit in the last place, 0 below −708; NaN stays NaN. v = n ln 2 + r,
// |r| ≤ 0.347, and the Taylor series of exp r to degree 13.
inline Vec exp(Vec v) {
  const Vec shifted = v * 0x1.71547652b82fep+0 + kRoundMagic;
  const Vec n = shifted - kRoundMagic;
  const Vec r = (v - n * kLn2High) - n * kLn2Low;
  constexpr double kInverseFactorial[] = {1.0,
                                          1.0,
                                          1.0 / 2,
                                          1.0 / 6,
                                          1.0 / 24,
                                          1.0 / 120,
                                          1.0 / 720,
                                          1.0 / 5040,
                                          1.0 / 40320,
                                          1.0 / 362880,
                                          1.0 / 3628800,
                                          1.0 / 39916800,
                                          1.0 / 479001600,
                                          1.0 / 6227020800};
  Vec series = broadcast(kInverseFactorial[13]);
#pragma GCC unroll 13
  for (int i = 12; i >= 0; --i) series = series * r + kInverseFactorial[i];
  const VecBits scale = ((VecBits)shifted - (VecBits)broadcast(kRoundMagic)) << 52;
  const Vec result = v < -708.0 ? Vec{} : (Vec)((VecBits)series + scale);
  return v != v ? v : result;
}

constexpr float kLn2 = 0.693147182f;  // 2e-9 too large, which an exponent of 60 makes 1e-7

// log(1 + u) of a finite u > −1 to about one unit in the last place of the result, also for small
// u.
#if defined(__AVX512F__)
// With 1 + u near 2^e (1 + i/16) and c near 1/(1 + i/16), of which a float holds log c to 2⁻²⁸:
// e log 2 − log c + log(1 + z), z = c 2^−e (1 + u) − 1 = c 2^−e u + (c 2^−e − 1), which is rounded
// once. log(1 + z) = z + z² P(z) on |z| < 0.032, P fitted to 3e-8.
inline VecF log1p_finite(VecF u) {
  constexpr VecF kInverse = {0x1p+0f,      0x1.e2p-1f,   0x1.c76p-1f,  0x1.af4cp-1f,
                             0x1.9964p-1f, 0x1.864p-1f,  0x1.74aap-1f, 0x1.6474p-1f,
                             0x1.559ep-1f, 0x1.47cp-1f,  0x1.3b12p-1f, 0x1.2f22p-1f,
                             0x1.2498p-1f, 0x1.1a6cp-1f, 0x1.10c2p-1f, 0x1.080ap-1f};
  constexpr VecF kLogs = {0.0f,           0x1.eea31cp-5f, 0x1.e010a4p-4f, 0x1.5f4a0ep-3f,
                          0x1.ca0b8ep-3f, 0x1.160dd0p-2f, 0x1.454552p-2f, 0x1.72d014p-2f,
                          0x1.9e5856p-2f, 0x1.c8c77ep-2f, 0x1.f12e76p-2f, 0x1.0c5ddcp-1f,
                          0x1.1e7bf6p-1f, 0x1.3099b4p-1f, 0x1.426d54p-1f, 0x1.530f7ep-1f};
  constexpr float kLog[] = {-0.49999997f, 0.33333328f, -0.25017029f, 0.20018245f};
  const VecFBits bits = (VecFBits)(1.0f + u) + (0x40000u - 0x3f800000u);  // to the next i/16
  const VecFBits high = bits & ~0x7fffffu;                                // e << 23
  const auto entry = [&](VecF table) {
    return (VecF)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(bits >> 19), (__m512)table);
  };
  const VecF c = (VecF)((VecFBits)entry(kInverse) - high);
  const VecF z = multiply_add(u, c, c - 1.0f);
  const VecF e = __builtin_convertvector((VecFInt)high, VecF);  // 2^23 times the exponent
  const VecF log = e * (kLn2 * 0x1p-23f) + entry(kLogs);
  return log + (z * z * (((kLog[3] * z + kLog[2]) * z + kLog[1]) * z + kLog[0]) + z);
}
#else
// w = 1 + u loses u − (w − 1), which is put back after the exponent is taken off: log(1 + f) =
// f − f²/2 + f³ P(f) on [√½ − 1, √2 − 1], P fitted to 6e-9.
inline VecF log1p_finite(VecF u) {
  const VecF w = 1.0f + u;
  const VecF lost = u - (w - 1.0f);
  const VecFBits bits = (VecFBits)w;
  const VecFBits high = (bits - 0x3f3504f3u) & ~0x7fffffu;  // exponent << 23
  const VecF m = (VecF)(bits - high);
  const VecF unit = (VecF)(0x3f800000u - high);  // 2^−exponent
  const VecF f = (m - 1.0f) + lost * unit;
  const VecF e = __builtin_convertvector((VecFInt)high, VecF);  // 2^23 times the exponent
  constexpr float kLog[] = {0.33333331197f, -0.25000837961f, 0.20001292692f, -0.16622764905f,
                            0.14199695852f, -0.13164186427f, 0.12779113629f, -0.07646101489f};
  VecF series = broadcast(kLog[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; --i) series = series * f + kLog[i];
  return e * (kLn2 * 0x1p-23f) + ((f * f) * (f * series - 0.5f) + f);
}
#endif

// The same where u may be NaN, which stays NaN, or infinite, which becomes NaN.
inline VecF log1p(VecF u) { return u - u == 0.0f ? log1p_finite(u) : u - u; }

// exp of −87 ≤ v ≤ 88 to one or two units in the last place. v = n ln 2 + r, |r| ≤ 0.347, and
// exp r = 1 + r + r² Q(r), Q fitted to 3e-9.
inline VecF exp_normal(VecF v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const VecF shifted = v * 1.44269504f + kMagic;
  const VecF n = shifted - kMagic;
  const VecF r = kFused ? multiply_add(n, broadcast(-kLn2), v)
                        : (v - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;  // 355/512 n is exact
  constexpr float kExp[] = {0.49999993440f, 0.16666520522f, 0.04166838934f, 0.00836873020f,
                            0.00138145708f};
  VecF series = broadcast(kExp[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) series = series * r + kExp[i];
  const VecF power = 1.0f + (r * r * series + r);
  return (VecF)((VecFBits)power + ((VecFBits)shifted << 23));
}

// exp of v ≤ ~88: 0 below −87, and NaN stays NaN.
inline VecF exp(VecF v) {
  const VecF result = v < -87.0f ? VecF{} : exp_normal(v);
  return v != v ? v : result;
}

// A sum that keeps what its additions round off: those of many nearly equal terms round alike.
struct CompensatedSum {
  VecF sum = {}, lost = {};

  void add(VecF v) {
    const VecF next = sum + v;
    lost += v - (next - sum);
    sum = next;
  }
  VecF total() const { return sum + lost; }
};

struct VecMath {
  static Vec log1p(Vec u) { return pfgm::log1p(u); }
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int clamp_size(int64_t left, int64_t most) {
  return static_cast<int>(left < most ? left : most);
}

}  // namespace
}  // namespace pfgm
