// SPDX-License-Identifier: Apache-2.0
// Gradients of the displacement v and the log mass, with cotangents g and g_m, in double:
//
//   w_j = exp(logit_j − log_mass),  a_j = g·(x0_j − x − v),  c_j = (k/2) w_j (a_j + g_m) / s_j
//   dx = −g − 2 Σ_j c_j (x − x0_j),  dt = −2 t Σ_j c_j
//   dx0_j = Σ_b (w_j g + 2 c_j (x − x0_j))
//
// For k = ∞: c_j = w_j (a_j + g_m) / (2t²), dt = (2/t) Σ_j c_j ‖x − x0_j‖². The weights are
// recomputed from the anchor's squared distance and its log weight. A tilt makes it forward mode
// (common/pull.h).
#include "../../field_math.h"
#include "../common/kernels.h"
#include "../common/pull.h"
#include "exact.h"

namespace pfgm {
namespace {

struct Query {
  RadialKernel kernel;
  TotalPull total;
  double nearest, anchor_log_weight, projection, grad_log_mass, cutoff;
  const double *x, *g;
  bool singular;  // on a reference at t = 0: zero gradients

  void start(const FieldParams& p, int64_t b) {
    const int64_t ld = round_up(p.dim, kPad);
    kernel = RadialKernel(p.half_k, p.t[b]);
    total = TotalPull(p, b);
    nearest = p.anchor_square[b];
    anchor_log_weight = p.anchor_log_weight[b];
    projection = p.projection[b];
    grad_log_mass = p.grad_log_mass[b];
    cutoff = -(kCutoff + log_count(p));
    x = p.x + b * ld;
    g = p.grad_displacement + b * ld;
    singular = kernel.singular(nearest);
  }

  // Writes the weights of squared distances; returns whether any is not 0.
  bool weigh(const double* squares, double* weights, int count, int padded) const {
    VecInt active = {};
    for (int r = 0; r < padded; r += kLanes) {
      const Vec logit = kernel.relative_logit<VecMath>(load(squares + r), broadcast(nearest));
      const Vec log_weight = logit + anchor_log_weight;  // beside its rounding at most 0
      const Vec at_most = log_weight > 0.0 ? Vec{} : log_weight;
      const Vec w = singular || logit < cutoff ? Vec{} : exp(at_most);
      active |= (VecInt)(w != 0.0);
      store(weights + r, w);
    }
    for (int r = count; r < padded; ++r) weights[r] = 0;
    int64_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= active[i];
    return any != 0;
  }

  // Projections g·(x0_j − x) become the coefficients c_j in place; returns their share of dt.
  double coefficients(const double* squares, const double* weights, double* a, int padded) const {
    Vec sum = {};
    for (int r = 0; r < padded; r += kLanes) {
      const Vec w = load(weights + r), square = load(squares + r);
      const Vec u = total.tilt == 0 ? Vec{} : kernel.argument(square, broadcast(nearest));
      const Vec pull = w * (load(a + r) - projection + grad_log_mass - total.tilt * u);
      const Vec c = kernel.gaussian ? pull * kernel.inverse_two_t2
                                    : pull * kernel.half_k / (square + kernel.offset);
      const Vec finite = w == 0.0 ? Vec{} : c;
      store(a + r, finite);
      sum += total.moment ? finite * square : finite;
    }
    return total.factor * reduce_add(sum);
  }
};

// Squared distances, weights and coefficients of one group of queries and one block of references.
template <class Block>
struct GroupWeights {
  double squares[kGroup][kMaxRows], weights[kGroup][kMaxRows], coefficients[kGroup][kMaxRows];

  // Returns false, without coefficients, where every weight is zero. dt (size,) is added to.
  bool compute(const Block& block, const Query* queries, int size, double* dt) {
    const double *x[kGroup], *g[kGroup];
    for (int q = 0; q < kGroup; ++q) {
      x[q] = queries[q < size ? q : 0].x;
      g[q] = queries[q < size ? q : 0].g;
    }
    block.distances(x, squares);
    bool any = false;
    for (int q = 0; q < size; ++q) {
      any |= queries[q].weigh(squares[q], weights[q], block.count, block.padded);
    }
    if (!any) return false;
    block.projections(x, g, coefficients);
    for (int q = 0; q < size; ++q) {
      dt[q] += queries[q].coefficients(squares[q], weights[q], coefficients[q], block.padded);
    }
    return true;
  }
};

// Sums over the references from first to last: dt (size,), and to dx (size,), unless that is null,
// rows of ld columns.
template <class Block>
void queries_tile(const FieldParams& p, const int64_t* rows, int size, int64_t first, int64_t last,
                  double* scratch, double* const* dx, double* dt) {
  const int64_t ld = round_up(p.dim, kPad), step = Block::rows(p.dim);
  Query queries[kTile];
  for (int q = 0; q < size; ++q) {
    queries[q].start(p, rows[q]);
    dt[q] = 0;
    for (int64_t c = 0; dx && c < ld; ++c) dx[q][c] = 0;
  }
  Block block(scratch, p.dim);
  GroupWeights<Block> group;
  for (; first < last; first += step) {
    block.load(p, first, clamp_size(last - first, step));
    for (int start = 0; start < size; start += kGroup) {
      const int n = clamp_size(size - start, kGroup);
      if (!group.compute(block, queries + start, n, dt + start)) continue;
      for (int q = 0; dx && q < n; ++q) {
        block.gather(queries[start + q].x, group.coefficients[q], dx[start + q]);
      }
    }
  }
  for (int q = 0; dx && q < size; ++q) {
    for (int64_t c = 0; c < ld; ++c) dx[q][c] *= 2;
  }
}

template <class Block>
void references_block(const FieldParams& p, int64_t first, int64_t rows, double* scratch) {
  Block block(scratch, p.dim);
  block.load(p, first, clamp_size(p.count - first, rows));
  block.clear_gradient();
  GroupWeights<Block> group;
  for (int64_t b = 0; b < p.batch; b += kGroup) {
    const int n = clamp_size(p.batch - b, kGroup);
    Query queries[kGroup];
    double dt[kGroup] = {};  // of no use here
    for (int q = 0; q < n; ++q) queries[q].start(p, b + q);
    if (!group.compute(block, queries, n, dt)) continue;
    for (int q = 0; q < n; ++q) {
      block.scatter(queries[q].x, queries[q].g, group.weights[q], group.coefficients[q]);
    }
  }
  block.store_gradient(p, first);
}

}  // namespace

void PFGM_ISA::exact_backward_queries(const FieldParams& p, Rows rows) {
  if (rows.size == 0) return;
  const Shares shares = exact_shares(p, rows.size);
  const int64_t ld = round_up(p.dim, kPad), scratch_size = block_size(p.dim);
  const int64_t tiles = static_cast<int64_t>(shares.tiles.size()) - 1;
  const Buffer<double> scratch(p.num_threads * scratch_size), dt(shares.size() * kTile);
  const Buffer<double> others((p.dx ? shares.size() - tiles : 0) * kTile * ld);
  // A row of a piece: in p.dx for the first one of its tile.
  const auto row = [&](int64_t n, int64_t i) {
    const int64_t tile = i / kTile;
    if (n == shares.tiles[tile]) return p.dx + rows[i] * ld;
    return others.get() + ((n - tile - 1) * kTile + i % kTile) * ld;
  };
  const auto tile = p.dim <= kMaxColumnDim ? queries_tile<ColumnBlock> : queries_tile<RowBlock>;
  parallel_for(p.num_threads, shares.count(), [&](int64_t share, int thread) {
    shares.for_pieces(share, [&](int64_t n) {
      const Piece& piece = shares.pieces[n];
      const int64_t start = piece.tile * kTile;
      const int size = clamp_size(rows.size - start, kTile);
      int64_t index[kTile];
      double* dx[kTile];
      for (int q = 0; q < size; ++q) {
        index[q] = rows[start + q];
        dx[q] = p.dx ? row(n, start + q) : nullptr;
      }
      tile(p, index, size, piece.first, piece.last, scratch.get() + thread * scratch_size,
           p.dx ? dx : nullptr, dt.get() + n * kTile);
    });
  });
  parallel_for(p.num_threads, rows.size, [&](int64_t i, int) {
    const int64_t b = rows[i], *ends = shares.tiles.data() + i / kTile;
    p.dt[b] = dt[ends[0] * kTile + i % kTile];
    for (int64_t n = ends[0] + 1; n < ends[1]; ++n) {
      p.dt[b] += dt[n * kTile + i % kTile];
      for (int64_t c = 0; p.dx && c < ld; ++c) p.dx[b * ld + c] += row(n, i)[c];
    }
  });
}

void PFGM_ISA::field_backward_references(const FieldParams& p) {
  const bool columns = p.dim <= kMaxColumnDim;
  const int64_t most = columns ? ColumnBlock::rows(p.dim) : RowBlock::rows(p.dim);
  const int64_t step = even_block(p.num_threads, p.count, most);
  const int64_t scratch_size = 2 * block_size(p.dim);  // a block and its gradient
  const Buffer<double> scratch(p.num_threads * scratch_size);
  parallel_for(p.num_threads, (p.count + step - 1) / step, [&](int64_t task, int thread) {
    (columns
         ? references_block<ColumnBlock>
         : references_block<RowBlock>)(p, task * step, step, scratch.get() + thread * scratch_size);
  });
}

}  // namespace pfgm
