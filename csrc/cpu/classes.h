// SPDX-License-Identifier: Apache-2.0
// Queries that see a range of the references each: a call of the kernels for each range.
#pragma once

#include <algorithm>
#include <vector>

#include "../poisson_field.h"
#include "common/kernels.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace pfgm {
namespace {

// References whose first pass takes longer than a query's coordinates in a sketch.
constexpr int64_t kLeastSketched = 1024;

template <class T>
void advance(T*& array, int64_t by) {
  if (array) array += by;
}

// The queries from `first` to `last` with the references of the range that they have in common.
FieldParams cut(const FieldParams& p, int64_t first, int64_t last) {
  FieldParams part = p;
  const int64_t start = p.ranges[2 * first], ld = round_up(p.dim, kPad);
  part.batch = last - first;
  part.count = p.ranges[2 * first + 1] - start;
  part.ranges = nullptr;
  advance(part.x, first * ld);
  advance(part.displacement, first * ld);
  advance(part.grad_displacement, first * ld);
  advance(part.dx, first * ld);
  advance(part.t, first);
  advance(part.tilt, first);
  advance(part.anchor, first);
  for (auto array : {&part.log_mass, &part.anchor_log_weight, &part.anchor_square, &part.projection,
                     &part.grad_log_mass, &part.dt}) {
    advance(*array, first);
  }
  advance(part.norms, start);
  advance(part.codes, start * p.dim);
  for (Sketch& sketch : part.sketches) {
    advance(sketch.points, start * sketch.dim);
    advance(sketch.rest, start);
    if (part.count < kLeastSketched) sketch.points = nullptr;
  }
  const int64_t size = p.value_type == ValueType::kFloat64   ? 8
                       : p.value_type == ValueType::kFloat32 ? 4
                                                             : 1;
  part.values = static_cast<const uint8_t*>(p.values) + start * p.dim * size;
  return part;
}

// Work, in columns of pairs, that is worth a thread's waking up.
constexpr int64_t kWorkPerThread = int64_t{1} << 20;

// Ranges with work for all threads have them in turn; the others are shared out among them.
void for_each_range(const FieldParams& p, void (*kernel)(const FieldParams&)) {
  if (!p.ranges) return kernel(p);
  std::vector<FieldParams> small;
  for (int64_t first = 0, last = 0; first < p.batch; first = last) {
    while (last < p.batch &&
           std::equal(p.ranges + 2 * first, p.ranges + 2 * first + 2, p.ranges + 2 * last)) {
      ++last;
    }
    FieldParams part = cut(p, first, last);
    if (part.batch * part.count * part.dim >= p.num_threads * kWorkPerThread) {
      kernel(part);
    } else {
      part.num_threads = 1;
      small.push_back(part);
    }
  }
  parallel_for(p.num_threads, small.size(), [&](int64_t i, int) { kernel(small[i]); });
}

}  // namespace
}  // namespace pfgm
