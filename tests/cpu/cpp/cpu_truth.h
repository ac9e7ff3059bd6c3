// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels must give, Eqs. (3) and (12) and their gradients, by loops in double:
//
//   s_j = ‖x − x0_j‖² + t²,  w = softmax_j(−(k/2) log s_j),  k = d + D
//   v = Σ_j w_j (x0_j − x),  log_mass = logsumexp_j(−(k/2) log s_j)
//   a_j = g·(x0_j − x − v),  c_j = (k/2) w_j (a_j + g_m) / s_j
//   dx = 2 Σ_j c_j (x0_j − x), beside the −g that the caller adds,  dt = −2 t Σ_j c_j
//   dx0_j = Σ_b (w_j g + 2 c_j (x − x0_j))
//   l̇_j = (k/s_j) (g·(x0_j − x) − t g_m), the logits' tangents where x moves by g and t by g_m
//   slope = Σ_j w_j l̇_j,  pull = Σ_j w_j (l̇_j − slope) (x0_j − x), the tangent of x + v
//
// For k = ∞: logit_j = −‖x − x0_j‖²/(2t²), c_j = w_j (a_j + g_m)/(2t²), dt = (2/t) Σ_j c_j ‖x −
// x0_j‖², l̇_j = g·(x0_j − x)/t² + ‖x − x0_j‖² g_m/t³.
#pragma once

#include <algorithm>

#include "cpu_problem.h"

// What is allowed: an error relative to the sum of the sizes of the terms.
inline double tolerance(const Spec& spec) { return spec.single ? 5e-6 : 1e-10; }

struct Truth {
  // The `_size` of a row is the norm of the sum of the absolute values of its terms.
  std::vector<double> v, v_size, log_mass;  // (B, d), (B,), (B,)
  std::vector<double> log_weights;          // (B, N)
  std::vector<double> dx, dx_size;          // (B, d), (B,)
  std::vector<double> dt, dt_size;          // (B,)
  std::vector<double> dx0, dx0_size;        // (N, d), (N,)
  std::vector<double> slope, slope_size;    // (B,)
  std::vector<double> pull, pull_size;      // (B, d), (B,)

  explicit Truth(const Problem& p)
      : v(p.batch * p.dim),
        v_size(p.batch),
        log_mass(p.batch),
        log_weights(p.batch * p.count),
        dx(p.batch * p.dim),
        dx_size(p.batch),
        dt(p.batch),
        dt_size(p.batch),
        dx0(p.count * p.dim),
        dx0_size(p.count),
        slope(p.batch),
        slope_size(p.batch),
        pull(p.batch * p.dim),
        pull_size(p.batch),
        references_(p.count * p.dim),
        difference_(p.count * p.dim),
        squares_(p.count),
        dx0_terms_(p.count * p.dim) {
    for (int64_t j = 0; j < p.count; ++j) {
      for (int64_t c = 0; c < p.dim; ++c) references_[j * p.dim + c] = p.value(j, c);
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      weigh(p, b);
      differentiate(p, b);
      push(p, b);
    }
    for (int64_t j = 0; j < p.count; ++j) dx0_size[j] = norm(&dx0_terms_[j * p.dim], p.dim);
  }

  // l̇ of a reference at x + difference; in size what becomes of it if nothing cancels.
  static double logit_tangent(const Problem& p, int64_t b, const double* difference, double* size) {
    const double t = p.t[b], t_dot = p.g_m[b], *x_dot = &p.g[b * p.ld()];
    double square = 0, projection = 0;
    for (int64_t c = 0; c < p.dim; ++c) {
      square += difference[c] * difference[c];
      projection += x_dot[c] * difference[c];
    }
    const double slope = gaussian(p) ? 1 / (t * t) : (p.dim + p.D) / (square + t * t);
    const double stretch = gaussian(p) ? -square * t_dot / t : t * t_dot;
    *size = slope * (norm(x_dot, p.dim) * std::sqrt(square) + std::fabs(stretch));
    return slope * (projection - stretch);
  }

 private:
  std::vector<double> references_;            // (N, d), decoded
  std::vector<double> difference_, squares_;  // of one query: x0_j − x (N, d), its square (N,)
  std::vector<double> dx0_terms_;             // (N, d)

  static double norm(const double* row, int64_t dim) {
    double square = 0;
    for (int64_t c = 0; c < dim; ++c) square += row[c] * row[c];
    return std::sqrt(square);
  }

  static bool gaussian(const Problem& p) { return std::isinf(p.D); }

  // A weight, for the size of a term that is then multiplied by the tolerance: those that are too
  // small to be summed at all count in full (twice, to be clear of rounding).
  static double size_of(double weight, double largest, const Problem& p) {
    const double least = std::fmin(tolerance(p), std::exp(-16)) / p.count * largest;
    return weight < least ? 2 * weight / tolerance(p) : weight;
  }

  void weigh(const Problem& p, int64_t b) {
    const double t = p.t[b], half_k = (p.dim + p.D) / 2;
    double nearest = INFINITY;
    for (int64_t j = 0; j < p.count; ++j) {
      squares_[j] = 0;
      for (int64_t c = 0; c < p.dim; ++c) {
        const double difference = references_[j * p.dim + c] - p.x[b * p.ld() + c];
        difference_[j * p.dim + c] = difference;
        squares_[j] += difference * difference;
      }
      nearest = std::fmin(nearest, squares_[j]);
    }
    const double s = nearest + t * t;
    double* logits = &log_weights[b * p.count];
    double sum = 0;
    for (int64_t j = 0; j < p.count; ++j) {
      const double excess = squares_[j] - nearest;
      logits[j] = gaussian(p) ? -excess / (2 * t * t)
                  : s == 0    ? (excess == 0 ? 0 : -INFINITY)
                              : -half_k * std::log1p(excess / s);
      sum += std::exp(logits[j]);
    }
    log_mass[b] = std::log(sum) + (gaussian(p) ? -nearest / (2 * t * t) : -half_k * std::log(s));
    for (int64_t j = 0; j < p.count; ++j) {
      logits[j] -= std::log(sum);
      const double weight = std::exp(logits[j]);
      v_size[b] += size_of(weight, 1 / sum, p) * std::sqrt(squares_[j]);
      if (weight == 0) continue;
      for (int64_t c = 0; c < p.dim; ++c) v[b * p.dim + c] += weight * difference_[j * p.dim + c];
    }
  }

  void differentiate(const Problem& p, int64_t b) {
    const double t = p.t[b], half_k = (p.dim + p.D) / 2;
    const double* g = &p.g[b * p.ld()];
    double *out = &dx[b * p.dim], largest = 0, projection = 0, projection_size = 0;
    std::vector<double> dx_terms(p.dim);
    bool singular = false;
    for (int64_t j = 0; j < p.count; ++j) {
      largest = std::fmax(largest, std::exp(log_weights[b * p.count + j]));
      singular |= !gaussian(p) && squares_[j] + t * t == 0;
    }
    for (int64_t c = 0; c < p.dim; ++c) {
      projection += g[c] * v[b * p.dim + c];
      projection_size += std::fabs(g[c] * v[b * p.dim + c]);
      dx_terms[c] = std::fabs(g[c]);
    }
    for (int64_t j = 0; !singular && j < p.count; ++j) {
      const double* difference = &difference_[j * p.dim];
      const double weight = std::exp(log_weights[b * p.count + j]);
      const double size = size_of(weight, largest, p);
      const double slope = gaussian(p) ? 0.5 / (t * t) : half_k / (squares_[j] + t * t);
      const double dt_factor = gaussian(p) ? 2 * squares_[j] / t : -2 * t;
      double a = p.g_m[b] - projection, a_size = std::fabs(p.g_m[b]) + projection_size;
      for (int64_t c = 0; c < p.dim; ++c) {
        a += g[c] * difference[c];
        a_size += std::fabs(g[c] * difference[c]);
      }
      const double pull = slope * weight * a, pull_size = slope * size * a_size;
      dt[b] += dt_factor * pull;
      dt_size[b] += std::fabs(dt_factor) * pull_size;
      for (int64_t c = 0; c < p.dim; ++c) {
        out[c] += 2 * pull * difference[c];
        dx_terms[c] += 2 * pull_size * std::fabs(difference[c]);
        dx0[j * p.dim + c] += weight * g[c] - 2 * pull * difference[c];
        dx0_terms_[j * p.dim + c] +=
            size * std::fabs(g[c]) + 2 * pull_size * std::fabs(difference[c]);
      }
    }
    dx_size[b] = norm(dx_terms.data(), p.dim);
  }

  void push(const Problem& p, int64_t b) {
    if (log_mass[b] == INFINITY) return;  // the singular point
    std::vector<double> tangents(p.count), sizes(p.count), weights(p.count), counts(p.count);
    for (int64_t j = 0; j < p.count; ++j) weights[j] = std::exp(log_weights[b * p.count + j]);
    const double largest = *std::max_element(weights.begin(), weights.end());
    for (int64_t j = 0; j < p.count; ++j) {
      tangents[j] = logit_tangent(p, b, &difference_[j * p.dim], &sizes[j]);
      counts[j] = size_of(weights[j], largest, p);
      slope[b] += weights[j] * tangents[j];
      slope_size[b] += counts[j] * sizes[j];
    }
    for (int64_t j = 0; j < p.count; ++j) {
      const double* difference = &difference_[j * p.dim];
      const double weight = weights[j] * (tangents[j] - slope[b]);
      pull_size[b] += counts[j] * (sizes[j] + slope_size[b]) * std::sqrt(squares_[j]);
      for (int64_t c = 0; c < p.dim; ++c) pull[b * p.dim + c] += weight * difference[c];
    }
  }
};
