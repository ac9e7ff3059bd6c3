// SPDX-License-Identifier: Apache-2.0
// tensor_core.h for whole matrices, as a library that numpy's arrays are handed to.
#include "tensor_core.h"

namespace {

constexpr int kSums = 16;

}  // namespace

#if defined(__x86_64__)
#define PFGM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PFGM_CLONES
#endif

// c (rows, columns) += a (rows, depth) b (depth, columns), columns a multiple of 16.
extern "C" PFGM_CLONES __attribute__((visibility("default"))) void multiply_matrices(
    const float* a, const float* b, float* c, int rows, int depth, int columns, int terms,
    int places) {
  for (int row = 0; row < rows; ++row) {
    const float* const left = a + static_cast<int64_t>(row) * depth;
    for (int column = 0; column < columns; column += kSums) {
      const auto right = [&](int k, int i) {
        return b[static_cast<int64_t>(k) * columns + column + i];
      };
      emulation::add_products<kSums>(
          {terms, places}, depth, [&](int k, int i) { return left[k] * right(k, i); },
          [&](int k, int i) {
            return emulation::exponent_of(left[k]) + emulation::exponent_of(right(k, i));
          },
          c + static_cast<int64_t>(row) * columns + column);
    }
  }
}
