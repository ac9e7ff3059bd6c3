// SPDX-License-Identifier: Apache-2.0
// What is done of each query before and after the sums over references (pfgm_kernels/rows.py), in
// double.
#include <algorithm>

#include "../field_math.h"
#include "common/kernels.h"
#include "common/simd.h"

namespace pfgm {
namespace {

// Calls task(p), p an array of floats or of doubles.
template <class Task>
void typed(const void* array, bool single, const Task& task) {
  single ? task(static_cast<const float*>(array)) : task(static_cast<const double*>(array));
}

template <class Task>
void typed(void* array, bool single, const Task& task) {
  single ? task(static_cast<float*>(array)) : task(static_cast<double*>(array));
}

double dot(const double* a, const double* b, int64_t dim) {
  constexpr int kChains = 4;  // sums in flight
  Vec sums[kChains] = {};
  int64_t c = 0;
  for (; c + kChains * kLanes <= dim; c += kChains * kLanes) {
    for (int i = 0; i < kChains; ++i)
      sums[i] += load(a + c + i * kLanes) * load(b + c + i * kLanes);
  }
  double sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < dim; ++c) sum += a[c] * b[c];
  return sum;
}

// Query b. displacement and grad_displacement have rows of ld, all others of dim.
struct Row {
  const FieldParams& p;
  int64_t b, dim = p.dim, at = b * dim, ld = round_up(dim, kPad);
  bool field = p.output == Output::kField;
  int64_t in_result = b * (dim + (field ? 1 : 0));

  template <class Task>
  void with_x(const Task& task) const {
    typed(p.single ? static_cast<const void*>(p.x_single) : p.x, p.single,
          [&](const auto* x) { task(x + at); });
  }

  // x0_a − x
  void to_anchor(double* __restrict out) const {
    const int64_t from = p.anchor[b] * dim;
    with_x([&](const auto* x) {
      const auto subtract = [&](const auto& value) {
        for (int64_t c = 0; c < dim; ++c) out[c] = value(from + c) - x[c];
      };
      switch (p.value_type) {
        case ValueType::kFloat32:
          return subtract(
              [y = static_cast<const float*>(p.values)](int64_t i) -> double { return y[i]; });
        case ValueType::kFloat64:
          return subtract([y = static_cast<const double*>(p.values)](int64_t i) { return y[i]; });
        case ValueType::kUint8:
          return subtract([&, y = static_cast<const uint8_t*>(p.values)](int64_t i) -> double {
            return p.table[y[i]];
          });
      }
    });
  }

  void finish(double* anchored) const {
    const double* v = p.displacement + b * ld;
    const double factor = field ? field_factor(p, ::hypot(::sqrt(dot(v, v, dim)), p.t[b])) : 1;
    typed(p.result, p.result_single, [&](auto* result) {
      result += in_result;
      if (p.output == Output::kMean) {
        with_x([&](const auto* x) {
          for (int64_t c = 0; c < dim; ++c) result[c] = x[c] + v[c];
        });
      } else {
        for (int64_t c = 0; c < dim; ++c) result[c] = v[c] * factor;
      }
      if (field) result[dim] = -p.t[b] * factor;
    });
    if (!p.residual) return;
    to_anchor(anchored);
    typed(p.residual, p.result_single, [&](auto* residual) {
      for (int64_t c = 0; c < dim; ++c) residual[at + c] = v[c] - anchored[c];
    });
  }

  void begin(double* anchored, double* __restrict v, double* __restrict a) const {
    to_anchor(anchored);
    typed(p.residual, p.result_single, [&](const auto* residual) {
      for (int64_t c = 0; c < dim; ++c) v[c] = anchored[c] + residual[at + c];
    });
    double last = 0;
    std::fill_n(a, dim, 0.0);
    if (p.result) {
      typed(p.result, p.result_single, [&](const auto* result) {
        for (int64_t c = 0; c < dim; ++c) a[c] = result[in_result + c];
        if (field) last = result[in_result + dim];
      });
    }
    const double t = p.t[b];
    const bool here = std::all_of(anchored, anchored + dim, [](double each) { return each == 0; });
    const bool singular = here && t == 0 && p.half_k != INFINITY;
    const ResultCotangent pull(p, t, singular, dot(v, v, dim), dot(a, v, dim), last);
    double *g = p.grad_displacement + b * ld, *dx = p.dx + at;
    const double sign = p.output == Output::kMean ? 0 : -1;
    for (int64_t c = 0; c < dim; ++c) {
      g[c] = pull.of_v(a[c], v[c]);
      dx[c] = sign * g[c];
    }
    std::fill(g + dim, g + ld, 0.0);
    p.projection[b] = dot(g, v, dim);
    p.anchor_square[b] = dot(anchored, anchored, dim);
    p.grad_log_mass[b] = singular || !p.log_mass ? 0 : p.log_mass[b];
    p.dt[b] = pull.of_t(p, last, t);
  }
};

// Calls task(row, area) for all queries, the area being of so many rows of a thread's own.
template <class Task>
void for_rows(const FieldParams& p, int rows, const Task& task) {
  const Buffer<double> areas(p.num_threads * rows * p.dim);
  parallel_for(p.num_threads, p.batch, [&](int64_t b, int thread) {
    task(Row{p, b}, areas.get() + thread * rows * p.dim);
  });
}

}  // namespace

void PFGM_ISA::field_finish(const FieldParams& p) {
  for_rows(p, 1, [](const Row& row, double* area) { row.finish(area); });
}

void PFGM_ISA::field_begin(const FieldParams& p) {
  for_rows(p, 3,
           [&](const Row& row, double* area) { row.begin(area, area + p.dim, area + 2 * p.dim); });
}

}  // namespace pfgm
