// SPDX-License-Identifier: Apache-2.0
// Vectors of doubles and floats by the compiler's vector extensions, as wide as the instruction set
// that the translation unit is compiled for. Everything has internal linkage: the same source is
// compiled once per instruction set, and no function may be shared between them.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// A VecF has two Vecs' worth of lanes.
typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef int64_t VecInt __attribute__((vector_size(8 * kLanes)));
typedef uint64_t VecBits __attribute__((vector_size(8 * kLanes)));  // wraps around
typedef double VecUnaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

constexpr int kFloatLanes = 2 * kLanes;
typedef float VecF __attribute__((vector_size(8 * kLanes)));
typedef int32_t VecFInt __attribute__((vector_size(8 * kLanes)));
typedef uint32_t VecFBits __attribute__((vector_size(8 * kLanes)));  // wraps around
typedef float VecFUnaligned __attribute__((vector_size(8 * kLanes), aligned(4), may_alias));
typedef int32_t VecFIntUnaligned __attribute__((vector_size(8 * kLanes), aligned(4), may_alias));
typedef float HalfF __attribute__((vector_size(4 * kLanes)));
typedef float HalfFUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const double* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(double* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline Vec broadcast(double v) { return v - Vec{}; }

inline VecF load(const float* p) { return *reinterpret_cast<const VecFUnaligned*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecFUnaligned*>(p) = v; }
inline VecF broadcast(float v) { return v - VecF{}; }

// One instruction each; b where either is NaN.
inline VecF smaller(VecF a, VecF b) { return a < b ? a : b; }
inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }

// kLanes floats or int32s as doubles, and back.
template <class T>
Vec widen(const T* p) {
  typedef T Half __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Vec);
}
inline void narrow(float* p, Vec v) {
  *reinterpret_cast<HalfFUnaligned*>(p) = __builtin_convertvector(v, HalfF);
}

// The lanes of a, then those of b, as floats.
inline VecF narrow(Vec a, Vec b) {
  const HalfF low = __builtin_convertvector(a, HalfF), high = __builtin_convertvector(b, HalfF);
#if defined(__AVX512F__)
  return (VecF)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#else
  VecF v;
  __builtin_memcpy(&v, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof low, &high, sizeof high);
  return v;
#endif
}

inline Vec widen(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(bytes));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline VecFInt load(const int32_t* p) { return *reinterpret_cast<const VecFIntUnaligned*>(p); }

// kFloatLanes bytes as int32s.
inline VecFInt widen_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VecFInt)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecFInt v;
  for (int i = 0; i < kFloatLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// v rounded to floats.
inline Vec round_to_float(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtps_pd(_mm512_cvtpd_ps((__m512d)v));
#else
  return __builtin_convertvector(__builtin_convertvector(v, HalfF), Vec);
#endif
}

// A bit for each lane whose mask, a VecInt or a VecFInt, is set.
template <class Mask>
unsigned bits(Mask mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof mask[0] == 8) return _mm512_movepi64_mask((__m512i)mask);
  return _mm512_movepi32_mask((__m512i)mask);
#else
  unsigned result = 0;
  for (size_t i = 0; i < sizeof mask / sizeof mask[0]; ++i) result |= (mask[i] & 1u) << i;
  return result;
#endif
}

// A bit for each lane in which a < b.
inline unsigned below(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);  // GCC goes by way of a vector
#else
  return bits(a < b);
#endif
}

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
  const __m512i i = _mm512_srli_epi32((__m512i)bits, 19);
  const VecF c = (VecF)((VecFBits)_mm512_permutexvar_ps(i, (__m512)kInverse) - high);
  const VecF z = u * c + (c - 1.0f);
  const VecF e = __builtin_convertvector((VecFInt)high, VecF);  // 2^23 times the exponent
  const VecF log = e * (kLn2 * 0x1p-23f) + (VecF)_mm512_permutexvar_ps(i, (__m512)kLogs);
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
  const VecF r = v - (shifted - kMagic) * kLn2;
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

// 1/√v of a positive, normal v, off by 2⁻¹⁴ of it at most.
inline VecF approximate_reciprocal_root(VecF v) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)v);
#else
  VecF root;
  for (int i = 0; i < kFloatLanes; ++i) root[i] = __builtin_sqrtf(v[i]);
  return 1.0f / root;
#endif
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
