// SPDX-License-Identifier: Apache-2.0
// Gradients in few dimensions, with the cotangents g of the displacement and g_m of the log mass:
//
//   c_j = (k/2) w_j (g·(x0_j − x) − g·v + g_m)/s_j,  dx = 2 Σ_j c_j (x0_j − x),  dt = −2t Σ_j c_j
//
// (k = ∞: c_j = w_j (…)/(2t²), dt = (2/t) Σ_j c_j s_j). Weights only occur divided by s, and
// (1 + u)^(−k/2 − 1) is that quotient up to a factor of the query.
#include "direct_sum.cuh"

namespace pfgm {
namespace {

// A warp to a query.
__global__ void __launch_bounds__(kDirectThreads)
    direct_finish_backward_kernel(const __grid_constant__ DirectArguments a) {
  const FieldParams& p = a.p;
  const int64_t b = query_of_warp();
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32;
  double last;
  const double sum = combine_sums(a, b, last);
  const double square = p.anchor_square[b], t = p.t[b];
  const Scale scale(p, b, square);
  double factor = cotangent_unit(p, b, p.grad_log_mass[b] - p.projection[b]) *
                  ::exp(p.anchor_log_weight[b] - scale.logit(square));
  factor *= scale.gaussian ? scale.rate : scale.half_k / scale.s;
  const bool sure = scale.reach(square) <= kGradientReach && factor - factor == 0;
  if (!settle(a, b, sure, sum, last)) return;
  if (lane < p.dim) p.dx[b * p.dim + lane] += 2 * factor * sum;
  if (lane == 0) p.dt[b] += (scale.gaussian ? 2 / t : -2 * t) * factor * last;
}

}  // namespace

void direct_backward(const FieldParams& p, Workspace& workspace) {
  const DirectArguments a = share_out(p, p.half_k + 1, workspace);  // ∞ stays
  launch_direct(a, [](auto dim) { return direct_sum_kernel<decltype(dim)::value, true>; });
  launch_warps(direct_finish_backward_kernel, a);
  exact_backward(p, workspace, a.left, nullptr);
}

}  // namespace pfgm
