// SPDX-License-Identifier: Apache-2.0
// The register-blocked product behind both passes of the kernels for larger d:
//
//   out[i][q] (+)= Σ_k a[i][k] packed[k][q]
//
// q runs over the queries of a tile, in vectors. In the first pass i runs over references and k
// over columns, in the second one i over columns and k over references. A step of k is one float,
// or four 8-bit values for the integer product. Of doubles squared differences are summed instead.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__)
#define PFGM_INTEGER_PRODUCT
#endif

namespace pfgm {
namespace {

constexpr int kTileQueries = 64;
// Accumulators stay in registers: 24 of 32, or 12 of 16; on ARM, where what is broadcast takes
// some, 20 of 32.
#if defined(__AVX512F__)
constexpr int kProductVectors = 4;
constexpr int product_rows(int vectors) { return vectors == 1 ? 12 : 24 / vectors; }
#elif defined(__aarch64__)
constexpr int kProductVectors = 4;
constexpr int product_rows(int vectors) { return vectors == 1 ? 12 : 20 / vectors; }
#else
constexpr int kProductVectors = 2;
constexpr int product_rows(int) { return 6; }
#endif

struct FloatProduct {
  typedef float Element;
  typedef VecF Sum;
  static constexpr int kLanes = kFloatLanes;
  static Sum add(Sum sum, float a, const float* packed) { return sum + a * load(packed); }
  static void put(float* out, Sum sum) { store(out, sum); }
  static void add_to(float* out, Sum sum) { store(out, load(out) + sum); }
};

struct DoubleProduct {
  typedef double Element;
  typedef Vec Sum;
  static constexpr int kLanes = pfgm::kLanes;
  static Sum add(Sum sum, double a, const double* packed) { return sum + a * load(packed); }
  static void put(double* out, Sum sum) { store(out, sum); }
  static void add_to(double* out, Sum sum) { store(out, load(out) + sum); }
};

struct SquaredDifferences {
  typedef double Element;
  typedef Vec Sum;
  static constexpr int kLanes = pfgm::kLanes;
  static Sum add(Sum sum, double a, const double* packed) {
    const Vec difference = a - load(packed);
    return sum + difference * difference;
  }
  static void put(double* out, Sum sum) { store(out, sum); }
  static void add_to(double* out, Sum sum) { store(out, load(out) + sum); }
};

#if defined(PFGM_INTEGER_PRODUCT)
// a holds four unsigned bytes, packed four signed ones for each query. Sums are exact.
struct IntegerProduct {
  typedef int32_t Element;
  typedef VecFInt Sum;
  static constexpr int kLanes = kFloatLanes;
  static VecFInt read(const int32_t* p) { return (VecFInt)_mm512_loadu_si512(p); }
  static Sum add(Sum sum, int32_t a, const int32_t* packed) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(a), (__m512i)read(packed));
  }
  static void put(int32_t* out, Sum sum) { _mm512_storeu_si512(out, (__m512i)sum); }
  static void add_to(int32_t* out, Sum sum) { put(out, read(out) + sum); }
};
#endif

// a holds two signed 16-bit integers, packed two for each query. Sums are exact where they fit.
struct ShortProduct {
  typedef int32_t Element;
  typedef VecFInt Sum;
  static constexpr int kLanes = kFloatLanes;
  static Sum add(Sum sum, int32_t a, const int32_t* packed) {
#if defined(__AVX512VNNI__)
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(a), (__m512i)load(packed));
#elif defined(__AVX512F__)
    return sum + (Sum)_mm512_madd_epi16(_mm512_set1_epi32(a), (__m512i)load(packed));
#elif defined(__AVX2__)
    return sum + (Sum)_mm256_madd_epi16(_mm256_set1_epi32(a), (__m256i)load(packed));
#elif defined(__SSE2__)
    return sum + (Sum)_mm_madd_epi16(_mm_set1_epi32(a), (__m128i)load(packed));
#else
    const VecFInt pairs = load(packed), first = (VecFInt)((VecFBits)pairs << 16) >> 16;
    return sum + first * static_cast<int16_t>(a) + (pairs >> 16) * (a >> 16);
#endif
  }
  static void put(int32_t* out, Sum sum) { *reinterpret_cast<VecFIntUnaligned*>(out) = sum; }
  static void add_to(int32_t* out, Sum sum) { put(out, load(out) + sum); }
};

// Elements of `a`, which need not be aligned: bytes of 8-bit codes are read four at a time.
template <class Element>
inline Element element(const Element* p) {
  Element value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <class Product, int kRows, int kVectors>
inline void product_tile(const typename Product::Element* a, int64_t row_stride, int64_t k_stride,
                         const typename Product::Element* packed, int64_t width, int64_t depth,
                         typename Product::Element* out, bool accumulate) {
  typename Product::Sum sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) {
      const auto value = element(a + i * row_stride + k * k_stride);
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = Product::add(sums[i][v], value, packed + k * width + v * Product::kLanes);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      auto* to = out + i * width + v * Product::kLanes;
      accumulate ? Product::add_to(to, sums[i][v]) : Product::put(to, sums[i][v]);
    }
  }
}

// Rows left over are taken in tiles of 4, 2 and 1: one at a time would wait for itself.
template <class Product, int kRows, int kVectors>
inline void product_columns(const typename Product::Element* a, int64_t rows, int64_t row_stride,
                            int64_t k_stride, const typename Product::Element* packed,
                            int64_t width, int64_t depth, typename Product::Element* out,
                            bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    product_tile<Product, kRows, kVectors>(a + i * row_stride, row_stride, k_stride, packed, width,
                                           depth, out + i * width, accumulate);
  }
  if constexpr (kRows > 1) {
    product_columns<Product, (kRows > 4 ? 4 : kRows / 2), kVectors>(
        a + i * row_stride, rows - i, row_stride, k_stride, packed, width, depth, out + i * width,
        accumulate);
  }
}

template <class Product, int kVectors, class... Arguments>
inline void product_columns(Arguments... arguments) {
  product_columns<Product, product_rows(kVectors), kVectors>(arguments...);
}

// packed (depth, width), out (rows, width); width is a multiple of kFloatLanes.
template <class Product>
void product(const typename Product::Element* a, int64_t rows, int64_t row_stride, int64_t k_stride,
             const typename Product::Element* packed, int64_t width, int64_t depth,
             typename Product::Element* out, bool accumulate) {
  constexpr int kWide = kProductVectors * Product::kLanes;
  int64_t q = 0;
  for (; q + kWide <= width; q += kWide) {
    product_columns<Product, kProductVectors>(a, rows, row_stride, k_stride, packed + q, width,
                                              depth, out + q, accumulate);
  }
  switch ((width - q) / Product::kLanes) {
    case 3:
      return product_columns<Product, 3>(a, rows, row_stride, k_stride, packed + q, width, depth,
                                         out + q, accumulate);
    case 2:
      return product_columns<Product, 2>(a, rows, row_stride, k_stride, packed + q, width, depth,
                                         out + q, accumulate);
    case 1:
      return product_columns<Product, 1>(a, rows, row_stride, k_stride, packed + q, width, depth,
                                         out + q, accumulate);
  }
}

}  // namespace
}  // namespace pfgm
