// SPDX-License-Identifier: Apache-2.0
// References that are alike: float products and distances of such have equal errors, so that no sum
// averages them out. Equal references are (crowds), and so are those of few values: a column adds
// to a partial sum one of a few numbers, and what float rounds off it depends on nothing else.
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

// Whether many references are equal, judged by a sample.
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
  return equal >= kCrowd || equal * 64 > rows;
}

// Whether there are few values, judged by a sample.
inline bool has_few_values(const FieldParams& p) {
  constexpr int64_t kSampleSize = 1024, kFew = 32;
  const int64_t total = p.count * p.dim, size = std::min(total, kSampleSize);
  std::vector<double> sample(size);
  for (int64_t i = 0; i < size; ++i) sample[i] = decode(p, total * i / size);
  std::sort(sample.begin(), sample.end());
  return std::unique(sample.begin(), sample.end()) - sample.begin() <= kFew;
}

inline bool are_alike(const FieldParams& p) { return has_few_values(p) || has_crowds(p); }

}  // namespace
}  // namespace pfgm
