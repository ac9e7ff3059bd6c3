// SPDX-License-Identifier: Apache-2.0
// Vectors of doubles by the compiler's vector extensions, as wide as the instruction set that the
// translation unit is compiled for. Everything has internal linkage: the same source is compiled
// once per instruction set, and no function may be shared between them.
#pragma once

#include <cstdint>

namespace pfgm {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
constexpr int kPad = 8;  // rows are padded to this many columns whatever the instruction set

typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef int64_t VecInt __attribute__((vector_size(8 * kLanes)));
typedef double VecUnaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

inline Vec load(const double* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(double* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline Vec broadcast(double v) { return v - Vec{}; }

inline double reduce_add(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 · 2^52: adding it rounds to an integer
constexpr double kLn2High = 6.93147180369123816490e-01;  // ln 2 to 33 bits: n · kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;   // ln 2 − kLn2High

// log of v > 0 to about one unit in the last place; NaN stays NaN. m = v / 2^e in [√½, √2) and
// log m = 2 artanh f, f = (m − 1)/(m + 1), |f| ≤ 0.1716, whose series converges in 11 terms.
inline Vec log(Vec v) {
  const VecInt bits = (VecInt)v;
  const VecInt exponent = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
  const Vec m = (Vec)(bits - (exponent << 52));
  const Vec e = (Vec)(exponent + (VecInt)broadcast(kRoundMagic)) - kRoundMagic;
  const Vec f = (m - 1.0) / (m + 1.0);
  const Vec f2 = f * f;
  Vec series = broadcast(1.0 / 21);
#pragma GCC unroll 10
  for (int n = 19; n >= 1; n -= 2) series = series * f2 + 1.0 / n;
  const Vec result = e * kLn2High + (2.0 * f * series + e * kLn2Low);
  return v != v ? v : result;
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
  const VecInt scale = ((VecInt)shifted - (VecInt)broadcast(kRoundMagic)) << 52;
  const Vec result = v < -708.0 ? Vec{} : (Vec)((VecInt)series + scale);
  return v != v ? v : result;
}

struct VecMath {
  static Vec log_ratio(Vec s, Vec nearest) { return log(s / nearest); }
};

}  // namespace
}  // namespace pfgm
