// SPDX-License-Identifier: Apache-2.0
// What is certain of the products x'·y_j of a query with the references, and which references may
// then carry weight.
//
//   r_j = ‖y_j‖² − 2 x'·y_j,   ‖x − x0_j‖² / unit² = r_j + ‖x'‖²
#pragma once

#include "queries.h"

namespace pfgm {
namespace {

// A query's r_j = norm_j − factor · product_j, off by at most slope · ‖y_j‖ + constant.
struct Bound {
  double factor, slope, constant;
  double squared, residual;  // ‖x'‖², and ‖x' − what was multiplied‖
  double roundings;          // how often the sum of a product was rounded to float
  double offset;             // squared distance / unit² − r
};

inline Bound make_bound(const FieldParams& p, const Operands& o, QueryNorms query, double factor,
                        double residual, double roundings) {
  const double x_norm = ::sqrt(query.squared);
  const double rounding = roundings * kFloatRounding * x_norm;
  const double deviation = o.codes ? o.deviation : kFloatRounding * o.radius;
  const double underflow = roundings > 0 ? 1e-37 * static_cast<double>(p.dim) : 0;
  Bound bound;
  bound.factor = factor;
  bound.squared = query.squared;
  bound.residual = residual;
  bound.roundings = roundings;
  bound.slope = 2 * (rounding + residual + deviation);
  bound.constant = 2 * (x_norm * deviation + underflow) + 0x1p-48 * query.squared;
  bound.offset = query.squared;
  return bound;
}

// What a product of `columns` columns, summed in float in sums of at most `step` from zero, may be
// off by, root mean square: its partial sums get as far as it does itself, and by chance as far as
// what its factors' norms multiply to, over √columns.
inline double product_rounding(int64_t columns, int64_t step, double product, double norms) {
  const double n = static_cast<double>(columns), sums = ::ceil(n / static_cast<double>(step));
  const double drift = product * product * (n / sums + sums * sums) / (3 * sums);
  const double chance = norms * norms * (1 / sums + sums / n) / 2;
  return kRounding * ::sqrt(drift + chance);
}

// Whether float projections g·y, in sums of `step` columns, are precise enough for dx: four times
// their error, root mean square, within 1e-5 of ‖g‖. norm: ‖y‖ of those that count. together:
// √Σ_j w_j² of the references that are projected in float, at most, where their errors are
// independent, else 1.
inline bool resolves_pull(const FieldParams& p, const Operands& o, int64_t b, double distance,
                          double norm, int64_t step, double together) {
  const int64_t ld = round_up(p.dim, kPad);
  const double *g = p.grad_displacement + b * ld, *x = p.x + b * ld;
  double square = 0, product = p.projection[b];  // of g and the mean of y
  for (int64_t c = 0; c < p.dim; ++c) {
    square += g[c] * g[c];
    product += g[c] * (x[c] - o.origin[c]);
  }
  const double size = ::sqrt(square);
  const double error = product_rounding(p.dim, step, product, size * o.unit * norm);
  const double slope = RadialKernel(p.half_k, p.t[b]).slope(distance * distance);
  return 4 * 2 * slope * distance * error * together <= 1e-5 * size;
}

// The r of a reference that is `depth` below one at this squared distance, in logits.
inline double farthest_r(const FieldParams& p, const Operands& o, int64_t b, double offset,
                         double nearest, double depth) {
  const RadialKernel kernel(p.half_k, p.t[b]);
  return kernel.farthest(nearest, depth) / (o.unit * o.unit) - offset;
}

// Largest r that counts beside the nearest reference.
inline double cutoff(const FieldParams& p, const Operands& o, int64_t b, double offset,
                     double smallest) {
  const double nearest = (smallest + offset) * o.unit * o.unit;
  return farthest_r(p, o, b, offset, nearest, cutoff_depth(p));
}

// Whether float holds the products of everything, which neither overflow nor vanish. False for NaN,
// so that what is not finite, in a query or in any reference, goes to the exact kernel.
inline bool in_range(const FieldParams& p, const Operands& o, int64_t b) {
  const QueryNorms norms = query_norms(p, o, b);
  const double size = norms.squared + norms.t_squared + o.radius * o.radius;
  return size > 1e-30 && size < 1e30;
}

// Candidates up to which a query is finished by direct differences: a pair then costs more, but
// there are fewer of them.
inline int64_t few_candidates(const FieldParams& p) { return std::max<int64_t>(64, p.count / 16); }

}  // namespace
}  // namespace pfgm
