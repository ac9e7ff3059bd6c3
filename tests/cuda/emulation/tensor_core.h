// SPDX-License-Identifier: Apache-2.0
// What tensor cores make of c + Σ a_k b_k of bfloat16 values, as models say that agree with the
// chips bit for bit (Xie et al., arXiv 2511.10909; Khattak and Mikaitis, arXiv 2512.07004).
//
// So many products at a time, each exact, and c are aligned to the largest exponent among them (of
// a product the sum of its factors'), cut toward zero after so many binary places, and added. The
// sum is cut to the 24 digits of a float. Nothing is rounded.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

struct TensorCore {
  int terms;   // products added at a time; 0: each alone, and each sum rounded to nearest
  int places;  // 23 are those of a float, what is more are guard bits
};

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline int larger(int a, int b) { return a > b ? a : b; }

// That of zero is below all others.
inline int exponent_of(float v) {
  const int field = bits<uint32_t>(v) >> 23 & 0xff;
  return v == 0 ? -1000 : larger(field, 1) - 127;
}

struct Factor {
  float value;
  int exponent;

  Factor() = default;
  explicit Factor(float v) : value(v), exponent(exponent_of(v)) {}
};

inline float power_of_two(int exponent) { return bits<float>((127 + exponent) << 23); }

// A sum of whole numbers times 2^exponent, cut to the digits of a float.
inline float cut(double sum, int exponent) {
  constexpr uint64_t kBeyondFloat = (1 << 29) - 1;
  const double v = sum * bits<double>(static_cast<int64_t>(1023 + exponent) << 52);
  return static_cast<float>(bits<double>(bits<uint64_t>(v) & ~kBeyondFloat));
}

constexpr int kLeast = -100, kMost = 100;  // exponents that need not be told from further ones
constexpr int kAtOnce = 8;                 // products whose sum surely fits into 32 bits

// kSums sums at once: c[i] += Σ_k product(k, i), k < depth, a multiple of 16; exponent_of_product
// is the sum of the factors'.
template <int kSums, class Product, class Exponent>
__attribute__((always_inline)) inline void add_products(const TensorCore& core, int depth,
                                                        const Product& product,
                                                        const Exponent& exponent_of_product,
                                                        float* c) {
  for (int k = 0; core.terms == 0 && k < depth; ++k) {
    for (int i = 0; i < kSums; ++i) c[i] += product(k, i);
  }
  for (int first = 0; core.terms != 0 && first < depth; first += core.terms) {
    const int end = first + core.terms;
    int exponent[kSums], largest = 0;
    for (int i = 0; i < kSums; ++i) exponent[i] = larger(exponent_of(c[i]), kLeast);
    for (int k = first; k < end; ++k) {
      for (int i = 0; i < kSums; ++i) {
        exponent[i] = larger(exponent[i], exponent_of_product(k, i));
      }
    }
    for (int i = 0; i < kSums; ++i) largest = larger(largest, exponent[i]);
    if (largest > kMost) {  // not finite, or almost
      for (int k = first; k < end; ++k) {
        for (int i = 0; i < kSums; ++i) c[i] += product(k, i);
      }
      continue;
    }
    float scale[kSums];
    double sum[kSums];
    for (int i = 0; i < kSums; ++i) {
      scale[i] = power_of_two(core.places - exponent[i]);
      sum[i] = static_cast<int32_t>(c[i] * scale[i]);  // toward zero
    }
    for (int k = first; k < end; k += kAtOnce) {
      int32_t part[kSums] = {};
      for (int j = 0; j < kAtOnce; ++j) {
        for (int i = 0; i < kSums; ++i) {
          part[i] += static_cast<int32_t>(product(k + j, i) * scale[i]);
        }
      }
      for (int i = 0; i < kSums; ++i) sum[i] += part[i];
    }
    for (int i = 0; i < kSums; ++i) c[i] = cut(sum[i], exponent[i] - core.places);
  }
}

}  // namespace emulation
