// SPDX-License-Identifier: Apache-2.0
// Crowds: many equal references, whose float products and distances have equal errors, so that no
// sum averages them out.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../field_math.h"

namespace pfgm {
namespace {

inline int64_t value_size(ValueType type) {
  return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 1;
}

// Whether there are crowds, judged by a sample. norm(j): ‖x0_j‖² or the like, the same for equals.
template <class Norm>
bool has_crowds(const FieldParams& p, const Norm& norm) {
  constexpr int64_t kSampleRows = 1024, kCrowd = 8;
  const int64_t rows = std::min(p.count, kSampleRows), size = p.dim * value_size(p.value_type);
  std::vector<std::pair<double, const char*>> sample;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t j = p.count * i / rows;
    const double value = norm(j);
    // NaN has no place in an order.
    sample.emplace_back(value == value ? value : -1, static_cast<const char*>(p.values) + j * size);
  }
  std::sort(sample.begin(), sample.end());
  int64_t equal = 0;
  for (int64_t i = 1; i < rows; ++i) {
    equal += sample[i].first == sample[i - 1].first &&
             std::memcmp(sample[i].second, sample[i - 1].second, size) == 0;
  }
  return equal >= kCrowd;
}

}  // namespace
}  // namespace pfgm
