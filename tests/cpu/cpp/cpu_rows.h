// SPDX-License-Identifier: Apache-2.0
// What is done of the queries before and after the sums, as pfgm_kernels/backends/cpu.py does it.
#pragma once

#include "cpu_problem.h"

// What the backward pass needs of the cotangents (p.g, p.g_m) of a displacement and its log mass.
struct Begun {
  Array<double> g, g_m, projection, anchor_square, dx, dt;

  explicit Begun(const Problem& p)
      : g(p.batch * p.ld(), p.skewed),
        g_m(p.batch, p.skewed),
        projection(p.batch, p.skewed),
        anchor_square(p.batch, p.skewed),
        dx(p.batch * p.dim, p.skewed),
        dt(p.batch, p.skewed) {}

  // result_type T holds the result, which is the cotangent then, and the residual.
  template <class T>
  void compute(const Problem& p, pfgm::FieldParams params, pfgm::Output output) {
    const int64_t columns = p.dim + (output == pfgm::Output::kField ? 1 : 0);
    Array<float> floats(p.single ? p.batch * p.dim : 0, p.skewed);
    Array<double> doubles(p.single ? 0 : p.batch * p.dim, p.skewed);
    Array<T> result(p.batch * columns, p.skewed), residual(p.batch * p.dim, p.skewed);
    for (int64_t i = 0; i < p.batch * p.dim; ++i) {
      const double x = p.x[i / p.dim * p.ld() + i % p.dim];
      p.single ? floats[i] = static_cast<float>(x) : doubles[i] = x;
    }
    params.x = doubles.get();
    params.x_single = floats.get();
    params.output = output;
    params.scale = 2;
    params.gamma = 3;
    params.result_single = sizeof(T) == 4;
    params.result = result.get();
    params.residual = residual.get();
    pfgm::field_finish_cpu(params);
    if (output == pfgm::Output::kDisplacement) {
      for (int64_t i = 0; i < p.batch * p.dim; ++i) {
        result[i] = static_cast<T>(p.g[i / p.dim * p.ld() + i % p.dim]);
      }
    }
    params.log_mass = p.g_m.get();
    params.grad_displacement = g.get();
    params.grad_log_mass = g_m.get();
    params.projection = projection.get();
    params.anchor_square = anchor_square.get();
    params.dx = dx.get();
    params.dt = dt.get();
    pfgm::field_begin_cpu(params);
  }
};
