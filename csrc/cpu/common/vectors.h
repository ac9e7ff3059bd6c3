// SPDX-License-Identifier: Apache-2.0
// Vectors of doubles and floats by the compiler's vector extensions, as wide as the instruction set
// that the translation unit is compiled for. Everything has internal linkage: the same source is
// compiled once per instruction set, and no function may be shared between them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pfgm {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
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

// Of the error of a root of 1/v its square remains, 1.5 times.
inline VecF newton_step(VecF v, VecF root) { return root * (1.5f - (0.5f * v) * (root * root)); }

// What follows has an instruction or two on each processor that compilers do not find: kLanes
// floats, int32s or bytes as doubles; kFloatLanes bytes as int32s; the lanes of a, then those of b,
// as floats; doubles rounded to floats; a bit for each lane whose mask, a VecInt or a VecFInt, is
// set, or in which a < b; a b + c, rounded once where kFused; and 1/√v of a positive, normal v, off
// by kRoughRoot of it at most.

#if defined(__SSE2__)
inline __m128i load_4_bytes(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return _mm_cvtsi32_si128(bytes);
}
#endif

#if defined(__AVX512F__)

// With a mask of all lanes: without one GCC 12 warns of what is not initialized.
inline Vec widen(const float* p) { return (Vec)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
inline Vec widen(const int32_t* p) {
  return (Vec)_mm512_maskz_cvtepi32_pd(0xff, _mm256_loadu_si256((const __m256i*)p));
}
inline Vec widen(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return (Vec)_mm512_maskz_cvtepi32_pd(0xff, _mm256_cvtepu8_epi32(bytes));
}
inline VecFInt widen_codes(const uint8_t* p) {
  return (VecFInt)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
}
inline VecF narrow(Vec a, Vec b) {
  const __m256 low = _mm512_maskz_cvtpd_ps(0xff, (__m512d)a);
  const __m256 high = _mm512_maskz_cvtpd_ps(0xff, (__m512d)b);
  return (VecF)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
inline Vec round_to_float(Vec v) {
  return (Vec)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_cvtpd_ps(0xff, (__m512d)v));
}
inline unsigned bits(VecInt mask) { return _mm512_movepi64_mask((__m512i)mask); }
inline unsigned bits(VecFInt mask) { return _mm512_movepi32_mask((__m512i)mask); }
inline unsigned below(VecF a, VecF b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}
constexpr bool kFused = true;
inline VecF multiply_add(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
constexpr double kRoughRoot = 0x1p-14;
inline VecF rough_reciprocal_root(VecF v) {
  return (VecF)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)v);
}

#elif defined(__AVX2__)

inline Vec widen(const float* p) { return (Vec)_mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Vec widen(const int32_t* p) {
  return (Vec)_mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i*)p));
}
inline Vec widen(const uint8_t* p) {
  return (Vec)_mm256_cvtepi32_pd(_mm_cvtepu8_epi32(load_4_bytes(p)));
}
inline VecFInt widen_codes(const uint8_t* p) {
  return (VecFInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
inline VecF narrow(Vec a, Vec b) {
  return (VecF)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)b), _mm256_cvtpd_ps((__m256d)a));
}
inline Vec round_to_float(Vec v) { return (Vec)_mm256_cvtps_pd(_mm256_cvtpd_ps((__m256d)v)); }
inline unsigned bits(VecInt mask) { return _mm256_movemask_pd((__m256d)mask); }
inline unsigned bits(VecFInt mask) { return _mm256_movemask_ps((__m256)mask); }
constexpr bool kFused = true;
inline VecF multiply_add(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
constexpr double kRoughRoot = 0x1.8p-12;
inline VecF rough_reciprocal_root(VecF v) { return (VecF)_mm256_rsqrt_ps((__m256)v); }

#elif defined(__SSE2__)

inline Vec widen(const float* p) {
  return (Vec)_mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)p)));
}
inline Vec widen(const int32_t* p) {
  return (Vec)_mm_cvtepi32_pd(_mm_loadl_epi64((const __m128i*)p));
}
inline Vec widen(const uint8_t* p) { return Vec{double(p[0]), double(p[1])}; }
inline VecFInt widen_codes(const uint8_t* p) {
  const __m128i zero = _mm_setzero_si128(), bytes = _mm_unpacklo_epi8(load_4_bytes(p), zero);
  return (VecFInt)_mm_unpacklo_epi16(bytes, zero);
}
inline VecF narrow(Vec a, Vec b) {
  return (VecF)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)a), _mm_cvtpd_ps((__m128d)b));
}
inline Vec round_to_float(Vec v) { return (Vec)_mm_cvtps_pd(_mm_cvtpd_ps((__m128d)v)); }
inline unsigned bits(VecInt mask) { return _mm_movemask_pd((__m128d)mask); }
inline unsigned bits(VecFInt mask) { return _mm_movemask_ps((__m128)mask); }
constexpr double kRoughRoot = 0x1.8p-12;
inline VecF rough_reciprocal_root(VecF v) { return (VecF)_mm_rsqrt_ps((__m128)v); }

#elif defined(__aarch64__)

inline Vec widen(const float* p) { return (Vec)vcvt_f64_f32(vld1_f32(p)); }
inline Vec widen(const int32_t* p) { return (Vec)vcvtq_f64_s64(vmovl_s32(vld1_s32(p))); }
inline Vec widen(const uint8_t* p) { return Vec{double(p[0]), double(p[1])}; }
inline VecFInt widen_codes(const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return (VecFInt)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}
inline VecF narrow(Vec a, Vec b) {
  return (VecF)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)a), (float64x2_t)b);
}
inline Vec round_to_float(Vec v) { return (Vec)vcvt_f64_f32(vcvt_f32_f64((float64x2_t)v)); }
inline unsigned bits(VecInt mask) { return (mask[0] & 1) | (mask[1] & 2); }
inline unsigned bits(VecFInt mask) { return vaddvq_u32((uint32x4_t)(mask & VecFInt{1, 2, 4, 8})); }
constexpr bool kFused = true;
inline VecF multiply_add(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
constexpr double kRoughRoot = 0x1.8p-16;
inline VecF rough_reciprocal_root(VecF v) {
  return newton_step(v, (VecF)vrsqrteq_f32((float32x4_t)v));  // which is off by 2⁻⁸
}

#else

template <class T>
Vec widen(const T* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
}
inline VecFInt widen_codes(const uint8_t* p) {
  VecFInt v;
  for (int i = 0; i < kFloatLanes; ++i) v[i] = p[i];
  return v;
}
inline VecF narrow(Vec a, Vec b) {
  VecF v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = static_cast<float>(a[i]);
    v[kLanes + i] = static_cast<float>(b[i]);
  }
  return v;
}
inline Vec round_to_float(Vec v) {
  return __builtin_convertvector(__builtin_convertvector(v, HalfF), Vec);
}
template <class Mask>
unsigned bits(Mask mask) {
  unsigned result = 0;
  for (size_t i = 0; i < sizeof mask / sizeof mask[0]; ++i) result |= (mask[i] & 1u) << i;
  return result;
}
constexpr double kRoughRoot = 0x1p-22;
inline VecF rough_reciprocal_root(VecF v) {
  VecF root;
  for (int i = 0; i < kFloatLanes; ++i) root[i] = __builtin_sqrtf(v[i]);
  return 1.0f / root;
}

#endif

#if !defined(__FMA__) && !defined(__aarch64__)
constexpr bool kFused = false;
inline VecF multiply_add(VecF a, VecF b, VecF c) { return a * b + c; }
#endif

#if !defined(__AVX512F__)
inline unsigned below(VecF a, VecF b) { return bits(a < b); }
#endif

// The root, off by 2⁻¹⁴ at most.
inline VecF approximate_reciprocal_root(VecF v) {
  const VecF root = rough_reciprocal_root(v);
  return kRoughRoot <= 0x1p-14 ? root : newton_step(v, root);
}

inline void narrow(float* p, Vec v) {
  *reinterpret_cast<HalfFUnaligned*>(p) = __builtin_convertvector(v, HalfF);
}
inline VecFInt load(const int32_t* p) { return *reinterpret_cast<const VecFIntUnaligned*>(p); }

}  // namespace
}  // namespace pfgm
