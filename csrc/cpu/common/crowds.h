// SPDX-License-Identifier: Apache-2.0
// Crowds: many equal references, whose float products and distances have equal errors, so that no
// sum averages them out.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../field_math.h"

namespace pfgm {
namespace {

inline int64_t value_size(ValueType type) {
  return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 1;
}

// Whether there are crowds, judged by a sample.
inline bool has_crowds(const FieldParams& p) {
  constexpr int64_t kSampleRows = 1024, kCrowd = 8;
  const int64_t size = p.dim * value_size(p.value_type);
  std::vector<const char*> sample(std::min(p.count, kSampleRows));
  const int64_t rows = static_cast<int64_t>(sample.size());
  for (int64_t i = 0; i < rows; ++i) {
    sample[i] = static_cast<const char*>(p.values) + p.count * i / rows * size;
  }
  std::sort(sample.begin(), sample.end(),
            [&](const char* a, const char* b) { return std::memcmp(a, b, size) < 0; });
  int64_t equal = 0;
  for (int64_t i = 1; i < rows; ++i) equal += std::memcmp(sample[i], sample[i - 1], size) == 0;
  return equal >= kCrowd;
}

}  // namespace
}  // namespace pfgm
