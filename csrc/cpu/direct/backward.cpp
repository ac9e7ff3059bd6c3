// SPDX-License-Identifier: Apache-2.0
// Gradients of the queries in few dimensions and in float (direct.h); exact/backward.cpp has
// the formulas. Weights only occur divided by s, and (1 + u)^(−k/2 − 1) is that quotient up to a
// factor of the query:
//
//   c_j = (k/2) w_j (g·(x0_j − x) − g·v + g_m) / s_j,  dx = 2 Σ_j c_j (x0_j − x),  dt = −2t Σ_j c_j
//
// For k = ∞: c_j = w_j (…) / (2t²), dt = (2/t) Σ_j c_j ‖x − x0_j‖². Cotangents are scaled to what
// float holds, and every factor of the query is put back in double. The tilt (common/pull.h) is
// by the squared distance: u has the rounding of s, which is large where t is.
#include "../common/kernels.h"
#include "../common/pull.h"
#include "direct.h"

namespace pfgm {
namespace {

// A vector of queries and their sums over one part of the references.
struct Queries {
  VecF x[kMaxDim], g[kMaxDim];
  VecF shift;  // g·v − g_m
  VecF tilt;   // κ u by the squared distance
  Scale scale;
  alignas(64) double factor[kFloatLanes];  // of the sums
  alignas(64) double sum[kFloatLanes], sums[kMaxDim][kFloatLanes];
  bool certified[kFloatLanes];

  // Lanes beyond the last query repeat it.
  void start(const FieldParams& p, int64_t first) {
    alignas(64) double offset[kFloatLanes], rate[kFloatLanes];
    VecF origin = {};
    for (int i = 0; i < kFloatLanes; ++i) {
      const int64_t b = first + i < p.batch ? first + i : p.batch - 1;
      const RadialKernel kernel(p.half_k, p.t[b]);
      offset[i] = kernel.offset;
      rate[i] = kernel.inverse_two_t2;
      origin[i] = static_cast<float>(p.anchor_square[b]);
      certified[i] = fits_float(kernel, p.anchor_square[b]);
    }
    const bool gaussian = p.half_k == INFINITY;
    scale.move(origin, offset, rate, gaussian);
    for (int i = 0; i < kFloatLanes; ++i) {
      const int64_t b = first + i < p.batch ? first + i : p.batch - 1;
      const RadialKernel kernel(p.half_k, p.t[b]);
      const double weight =
          ::exp(p.anchor_log_weight[b] -
                kernel.relative_logit<ScalarMath>(p.anchor_square[b], scale.square[i]));
      factor[i] = weight * kernel.slope(scale.square[i]) * take_cotangent(p, b, i, kernel);
      sum[i] = 0;
      for (int c = 0; c < p.dim; ++c) sums[c][i] = 0;
    }
  }

  // Fills lane `i` of x, g, shift and tilt; returns what the cotangents were divided by.
  double take_cotangent(const FieldParams& p, int64_t b, int i, const RadialKernel& kernel) {
    const int64_t ld = round_up(p.dim, kPad);
    const double *row = p.x + b * ld, *cotangent = p.grad_displacement + b * ld;
    double square = 0;
    for (int c = 0; c < p.dim; ++c) square += cotangent[c] * cotangent[c];
    const double kappa = TotalPull(p, b).tilt;
    const double s = p.anchor_square[b] + kernel.offset;
    const double size =
        ::sqrt(square * s) + ::fabs(p.projection[b]) + ::fabs(p.grad_log_mass[b]) + ::fabs(kappa);
    const double unit = size > 0 ? size : 1;
    const double steep = kappa * (kernel.gaussian ? kernel.inverse_two_t2 : 1 / s);
    tilt[i] = static_cast<float>(steep / unit);
    shift[i] = static_cast<float>((p.projection[b] - p.grad_log_mass[b]) / unit);
    for (int c = 0; c < p.dim; ++c) {
      x[c][i] = static_cast<float>(row[c]);
      g[c][i] = static_cast<float>(cotangent[c] / unit);
    }
    return unit;
  }

  // Squared distances v and projections a = g·(x0 − x) of a block's references.
  void compare(const DirectBlock& block, VecF* v, VecF* a) const {
    for_strips(block.dim, [&](int first, auto columns) {
      constexpr int n = decltype(columns)::value;
      VecF query[n], cotangent[n];
      for (int c = 0; c < n; ++c) query[c] = x[first + c];
      for (int c = 0; c < n; ++c) cotangent[c] = g[first + c];
      const float* row = block.rows + first;
      for (int r = 0; r < block.padded; ++r, row += block.dim) {
        VecF square = first == 0 ? VecF{} : v[r], projection = first == 0 ? VecF{} : a[r];
        for (int c = 0; c < n; ++c) {
          const VecF difference = query[c] - row[c];
          square += difference * difference;
          projection -= difference * cotangent[c];
        }
        v[r] = square;
        a[r] = projection;
      }
    });
  }

  bool finite(int lane, int64_t dim) const {
    double difference = sum[lane] - sum[lane];
    for (int c = 0; c < dim; ++c) difference += sums[c][lane] - sums[c][lane];
    return difference == 0;
  }
};

template <Weighing kWeighing, bool kTilted>
void add_block(const Weights& quotient, const DirectBlock& block, Queries& queries) {
  alignas(64) VecF v[kBlock], a[kBlock];
  queries.compare(block, v, a);
  constexpr bool kGaussian = kWeighing == Weighing::kGaussian, kMoment = kGaussian && !kTilted;
  constexpr int kGroup = 4;  // for instruction-level parallelism
  VecF squares = {};         // Σ_j c_j ‖x − x0_j‖²
  for (int start = 0; start < block.padded; start += kRun) {
    VecF part = {};
    for (int r = start; r < start + kRun; r += kGroup) {
      VecF weights[kGroup];
      for (int i = 0; i < kGroup; ++i) weights[i] = v[r + i];
      quotient.weigh<kWeighing, kGroup>(queries.scale, weights);
      for (int i = 0; i < kGroup; ++i) {
        VecF pull = a[r + i] - queries.shift;
        if constexpr (kTilted) pull -= queries.tilt * (v[r + i] - queries.scale.origin);
        a[r + i] = r + i < block.count ? weights[i] * pull : VecF{};
        if constexpr (kMoment) part += a[r + i] * v[r + i];
      }
    }
    squares += part;
  }
  double unused[kFloatLanes] = {};
  gather(block, queries.x, a, kMoment ? unused : queries.sum, queries.sums);
  if constexpr (kMoment) accumulate(queries.sum, squares);
}

// Sums over the references [begin, end): dx, dt and whether they are certified, (size, …) each.
template <Weighing kWeighing, bool kTilted>
void backward_tile(const FieldParams& p, const Weights& quotient, int64_t start, int size,
                   int64_t begin, int64_t end, double* dx, double* dt, bool* certified) {
  Queries queries[kTileVectors];
  const int vectors = (size + kFloatLanes - 1) / kFloatLanes;
  for (int i = 0; i < vectors; ++i) queries[i].start(p, start + i * kFloatLanes);
  DirectBlock block;
  for (int64_t first = begin; first < end; first += kBlock) {
    block.load(p, first, clamp_size(end - first, kBlock));
    for (int i = 0; i < vectors; ++i) add_block<kWeighing, kTilted>(quotient, block, queries[i]);
  }
  for (int q = 0; q < size; ++q) {
    const Queries& vector = queries[q / kFloatLanes];
    const int lane = q % kFloatLanes;
    const double factor = vector.factor[lane];
    for (int c = 0; c < p.dim; ++c) dx[q * p.dim + c] = 2 * factor * vector.sums[c][lane];
    dt[q] = factor * vector.sum[lane] * TotalPull(p, start + q).factor;
    certified[q] = vector.certified[lane] && vector.finite(lane, p.dim) && factor - factor == 0;
  }
}

}  // namespace

void PFGM_ISA::direct_backward_queries(const FieldParams& p, uint8_t* uncertified) {
  const int64_t ld = round_up(p.dim, kPad);
  const Shares shares = direct_shares(p);
  const int64_t rows = shares.size() * kQueries;
  const Weights quotient(p.half_k + 1);
  const Buffer<double> dx(rows * p.dim), dt(rows);
  const Buffer<bool> certified(rows);
  const auto run_piece = [&](int64_t n) {
    const Piece& piece = shares.pieces[n];
    const int64_t start = piece.tile * kQueries, out = n * kQueries;
    dispatch(quotient.weighing, [&](auto weighing) {
      constexpr Weighing kWeighing = decltype(weighing)::value;
      const auto tile = p.tilt ? backward_tile<kWeighing, true> : backward_tile<kWeighing, false>;
      tile(p, quotient, start, clamp_size(p.batch - start, kQueries), piece.first, piece.last,
           dx.get() + out * p.dim, dt.get() + out, certified.get() + out);
    });
  };
  parallel_for(p.num_threads, shares.count(),
               [&](int64_t share, int) { shares.for_pieces(share, run_piece); });
  for (int64_t b = 0; b < p.batch; ++b) {
    uncertified[b] = 0;
    p.dt[b] = 0;
    for (int64_t c = 0; p.dx && c < ld; ++c) p.dx[b * ld + c] = 0;
    const int64_t* ends = shares.tiles.data() + b / kQueries;
    for (int64_t n = ends[0]; n < ends[1]; ++n) {
      const int64_t row = n * kQueries + b % kQueries;
      if (!certified[row]) uncertified[b] = 1;
      p.dt[b] += dt[row];
      for (int64_t c = 0; p.dx && c < p.dim; ++c) p.dx[b * ld + c] += dx[row * p.dim + c];
    }
  }
}

}  // namespace pfgm
