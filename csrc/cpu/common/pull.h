// SPDX-License-Identifier: Apache-2.0
// The coefficients c_j of a backward pass serve forward mode, too. For tangents ẋ and ṫ the logits
// l_j = −(k/2) log s_j have tangents, relative to a number l̇ of the query, such as the anchor's,
//
//   l̇_j − l̇ = (k/s_j) (ẋ·(x0_j − x) − (t ṫ + κ) − κ u_j),   κ = l̇ s_a/k,  u_j = s_j/s_a − 1
//
// and for k = ∞ (1/t²) (ẋ·(x0_j − x) − (l̇ t² − q_a ṫ/t) + 2 t ṫ u_j) with the squared distances q
// and u_j = (q_j − q_a)/2t². That is 2 c_j / w_j (exact/backward.cpp) with ẋ as the cotangent g,
// another number for g·v − g_m, and a tilt κ by u_j, which is what the logit is a function of:
//
//   c_j = (k/2) w_j (g·(x0_j − x) − (g·v − g_m) − κ u_j) / s_j
//   dx = 2 Σ_j c_j (x0_j − x) = Σ_j w_j (l̇_j − l̇) (x0_j − x),   2 Σ_j c_j = Σ_j w_j (l̇_j − l̇)
//
// 2 Σ_j c_j is also the trace of the derivative of the mean x + v by x, with y_j = x0_j − x
//
//   Σ_j w_j (k/s_j) y_j·(y_j − v),   y_j·(y_j − v) = −v·y_j + q_a + s_a u_j
//
// (k = ∞: 1/t² for k/s_j, and q_a + 2t² u_j): with g = −v, −q_a for g·v − g_m, κ = −s_a or −2t².
#pragma once

#include "../../field_math.h"

namespace pfgm {
namespace {

// What becomes of the c_j of a query beside dx: dt, or in forward mode 2 Σ_j c_j.
struct TotalPull {
  bool moment;    // whether c_j ‖x − x0_j‖² are summed, and not the c_j
  double factor;  // of the sum
  double tilt;    // κ; 0 in the backward pass

  TotalPull() = default;
  TotalPull(const FieldParams& p, int64_t b) {
    const bool gaussian = p.half_k == INFINITY;
    moment = gaussian && !p.tilt;
    factor = p.tilt ? 2 : gaussian ? 2 / p.t[b] : -2 * p.t[b];
    tilt = p.tilt ? p.tilt[b] : 0;
  }
};

}  // namespace
}  // namespace pfgm
