// SPDX-License-Identifier: Apache-2.0
// Few dimensions: the sums over all references in float (direct.cuh).
//
// Instructions of sm_90 for a pair, D = 1; forward with the search for the nearest (6 … 77 of
// them):
//
//   columns     2     4     8    16    24    32
//   forward    37    51    94   168   250   317
//   backward   39    50    88   149   222   278
//
// Seven in ten are arithmetic in float, one is MUFU.RSQ, and a reference is read from shared
// memory once for all queries of a thread. At 128 lanes, a multiprocessor does at
// most 3.5, 2.5, 1.4, 0.76, 0.51 and 0.40 pairs a cycle forward.
#pragma once

#include "direct.cuh"
#include "float_math.cuh"

namespace pfgm {
namespace {

// ‖difference‖² as the sum of two numbers.
template <int kDim>
__device__ __forceinline__ void square_of(const float (&difference)[kDim], float& high,
                                          float& low) {
  high = low = 0;
  PFGM_UNROLL
  for (int first = 0; first < kDim; first += kDimGroup) {
    float part = difference[first] * difference[first];
    PFGM_UNROLL
    for (int c = first + 1; c < first + kDimGroup && c < kDim; ++c) {
      part += difference[c] * difference[c];
    }
    if (first == 0) {
      high = part;
    } else {
      const float grown = high + part, rest = grown - high;
      low += (high - (grown - rest)) + (part - rest);
      high = grown;
    }
  }
}

// w = (1 + u)^(−k/2); k = ∞: exp(−u).
template <int n>
__device__ __forceinline__ void weigh(const Weighing& how, const float (&u)[n], float (&w)[n]) {
  if (how.power == 0) {
    PFGM_UNROLL
    for (int i = 0; i < n; ++i) {
      w[i] = ::expf(logit_float(u[i], how.half_k, how.half_k_low, how.gaussian));
    }
    return;
  }
  // With e = 1 − (1 + u) y² the power is y^k (1 − e)^(−k/2): e is the error of the root y.
  float square[n];
  const float even = how.power % 2 == 0 ? 1 : 0;
  PFGM_UNROLL
  for (int i = 0; i < n; ++i) {
    const float ratio = 1 + u[i], y = reciprocal_root(ratio);
    square[i] = y * y;
    const float lost = u[i] - (ratio - 1);
    const float e = ::fmaf(-ratio, square[i], 1) - lost * square[i];
    const float first = even != 0 ? 1 : y;
    w[i] = first + first * (e * how.half_k);
  }
  for (unsigned left = how.power / 2u; left > 0;) {
    if (left % 2 == 1) {
      PFGM_UNROLL
      for (int i = 0; i < n; ++i) w[i] *= square[i];
    }
    left /= 2;
    if (left == 0) break;
    PFGM_UNROLL
    for (int i = 0; i < n; ++i) square[i] *= square[i];
  }
}

// Sums of float terms: runs in plain float, their sums in two floats, as good as a double and
// without the time that one takes.
template <int n>
struct RunningSums {
  float run[n] = {}, high[n] = {}, low[n] = {};

  __device__ __forceinline__ void end_run() {
    PFGM_UNROLL
    for (int c = 0; c < n; ++c) {
      const float grown = high[c] + run[c], rest = grown - high[c];
      low[c] += (high[c] - (grown - rest)) + (run[c] - rest);
      high[c] = grown;
      run[c] = 0;
    }
  }
};

// What the sums need of one query.
template <int kDim, bool kBackward>
struct Query {
  float x[kDim], g[kBackward ? kDim : 1];
  float origin, inverse, inverse_low;
  float constant, constant_low;
  int without;  // a reference of the part that is left out, or −1
  RunningSums<kDim + 1> sums;
};

template <int kDim, bool kBackward>
__device__ void read_query(const DirectArguments& a, const Place<kDim>& place, int64_t b,
                           Query<kDim, kBackward>& query) {
  const FieldParams& p = a.p;
  const Scale scale(p, b, kBackward ? p.anchor_square[b] : a.square[b]);
  query.origin = scale.origin;
  query.inverse = scale.inverse;
  query.inverse_low = scale.inverse_low;
  const int64_t without = kBackward ? -1 : p.anchor[b] - place.begin;
  query.without = without >= 0 && without < place.size ? static_cast<int>(without) : -1;
  double unit = 1;
  if constexpr (kBackward) {
    double constant = p.grad_log_mass[b] - p.projection[b];
    unit = cotangent_unit(p, b, constant);
    constant /= unit;
    query.constant = static_cast<float>(constant);
    query.constant_low = static_cast<float>(constant - query.constant);
  }
  PFGM_UNROLL
  for (int c = 0; c < kDim; ++c) {
    const bool inside = c < p.dim;
    query.x[c] = inside ? p.x_single[b * p.dim + c] : 0;
    if constexpr (kBackward) {
      query.g[c] = inside ? static_cast<float>(p.grad_displacement[b * p.dim + c] / unit) : 0;
    }
  }
}

// Adds kTogether references, `shares` rows apart in the tile, which begins at `offset` of the part,
// to the sums of a thread's queries.
template <int kDim, bool kBackward>
__device__ __forceinline__ void add_rows(const DirectArguments& a, const float* tile, int row,
                                         int offset, int size,
                                         Query<kDim, kBackward> (&queries)[Shape<kDim>::kQueries]) {
  constexpr int kQueries = Shape<kDim>::kQueries, kTogether = Shape<kDim>::kTogether;
  constexpr int kPairs = kQueries * kTogether;
  float difference[kPairs][kDim], u[kPairs], w[kPairs], squares[kPairs];
  PFGM_UNROLL
  for (int r = 0; r < kTogether; ++r) {
    float y[kDim];
    load_row<kDim>(tile, row + r * a.shares, y);
    PFGM_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const int i = r * kQueries + q;
      PFGM_UNROLL
      for (int c = 0; c < kDim; ++c) difference[i][c] = y[c] - queries[q].x[c];
      float low;
      square_of(difference[i], squares[i], low);
      u[i] = squares[i] - queries[q].origin;
      if constexpr (kDim > kDimGroup) u[i] += low;
      u[i] *= queries[q].inverse;
      u[i] += u[i] * queries[q].inverse_low;
    }
  }
  weigh(a.weighing, u, w);
  PFGM_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    Query<kDim, kBackward>& query = queries[i % kQueries];
    const int place = offset + row + i / kQueries * a.shares;
    float weight = place < size && place != query.without ? w[i] : 0;
    if constexpr (kBackward) {
      float pull = 0;
      PFGM_UNROLL
      for (int c = 0; c < kDim; ++c) pull += query.g[c] * difference[i][c];
      weight *= (pull + query.constant) + query.constant_low;
    }
    query.sums.run[kDim] += kBackward && a.weighing.gaussian ? weight * squares[i] : weight;
    PFGM_UNROLL
    for (int c = 0; c < kDim; ++c) query.sums.run[c] += weight * difference[i][c];
  }
}

// Σ_j w_j (x0_j − x) and, last, Σ_j w_j over a part of the references; for kBackward with
// w_j (g·(x0_j − x) + constant) in place of w_j, and for the Gaussian kernel then the last with
// that times ‖x − x0_j‖².
template <int kDim, bool kBackward>
__global__ void __launch_bounds__(kDirectThreads, Shape<kDim>::blocks(kBackward))
    direct_sum_kernel(const __grid_constant__ DirectArguments a) {
  constexpr int kQueries = Shape<kDim>::kQueries;
  const FieldParams& p = a.p;
  float* const tile = shared_memory<float>();
  const Place<kDim> place(a);
  Query<kDim, kBackward> queries[kQueries];
  a.left.clear();
  PFGM_UNROLL
  for (int q = 0; q < kQueries; ++q) read_query(a, place, place.row(p, q), queries[q]);

  clear_tile<kDim>(tile);
  for (int offset = 0; offset < place.size; offset += kTile) {
    load_tile<kDim>(p, place.begin + offset, tile);
    if (place.query >= p.batch) continue;
    const int rows = place.size - offset < kTile ? place.size - offset : kTile;
    for (int run = 0; run < rows; run += kRun * a.shares) {
      const int end = run + kRun * a.shares < rows ? run + kRun * a.shares : rows;
      for (int row = run + place.share; row < end; row += Shape<kDim>::kTogether * a.shares) {
        add_rows(a, tile, row, offset, place.size, queries);
      }
      PFGM_UNROLL
      for (int q = 0; q < kQueries; ++q) queries[q].sums.end_run();
    }
  }

  PFGM_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const int64_t b = place.query + q * place.step;
    double* const out = a.sums + (place.row(p, q) * a.splits + place.split) * (p.dim + 1);
    PFGM_UNROLL
    for (int c = 0; c <= kDim; ++c) {
      const double own = static_cast<double>(queries[q].sums.high[c]) + queries[q].sums.low[c];
      const double sum = warp_sum(own, a.shares);
      const bool last = c == kDim, mine = place.share == 0 && b < p.batch && (last || c < p.dim);
      if (mine) out[last ? p.dim : c] = sum;
    }
  }
}

}  // namespace
}  // namespace pfgm
