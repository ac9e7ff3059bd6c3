// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), by direct differences in double and in one pass:
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
//
// Threads take tiles of queries; where these are too few, the references are shared out as well,
// in parts whose states are combined at the end.
#include "../../field_math.h"
#include "../common/kernels.h"
#include "exact.h"

namespace pfgm {
namespace {

// One query's running sum over the references of its split.
struct Query {
  RadialKernel kernel;
  OnlineState state;
  double depth, cutoff;  // no weight beyond the cutoff, where logits are below −depth
  int64_t anchor;
  const double* x;
  double* displacement;

  void start(const FieldParams& p, int64_t b, double* sums) {
    const int64_t ld = round_up(p.dim, kPad);
    kernel = RadialKernel(p.half_k, p.t[b]);
    state = OnlineState();
    depth = kCutoff + log_count(p);
    cutoff = INFINITY;
    anchor = 0;
    x = p.x + b * ld;
    displacement = sums;
    for (int64_t c = 0; c < ld; ++c) displacement[c] = 0;
  }

  // Checks squared distances in place and admits the nearest of them.
  void admit(double* squares, int64_t first, int count, int padded, int64_t ld) {
    for (int r = count; r < padded; ++r) squares[r] = squares[0];
    Vec minima = broadcast(double{INFINITY});
    for (int r = 0; r < padded; r += kLanes) {
      const Vec v = kernel.checked(load(squares + r));
      store(squares + r, v);
      minima = v < minima ? v : minima;
    }
    double nearest = minima[0];
    for (int i = 1; i < kLanes; ++i) nearest = minima[i] < nearest ? minima[i] : nearest;
    if (!(nearest < state.nearest)) return;
    for (int r = count - 1; r >= 0; --r) anchor = squares[r] == nearest ? first + r : anchor;
    const double factor = state.update(nearest, kernel);
    cutoff = kernel.farthest(nearest, depth);
    for (int64_t c = 0; c < ld; ++c) displacement[c] *= factor;
  }

  // Turns squared distances into weights relative to the nearest, in place, and adds them up;
  // returns whether any is not zero.
  bool weigh(double* squares, int count, int padded) {
    VecInt active = {};
    for (int r = 0; r < padded; r += kLanes) active |= ~(VecInt)(load(squares + r) > cutoff);
    int64_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= active[i];
    if (!any) return false;
    if (kernel.singular(state.nearest)) {
      for (int r = 0; r < count; ++r) {
        squares[r] = kernel.relative_weight(squares[r], state.nearest);
      }
    } else {
      const Vec nearest = broadcast(state.nearest);
      for (int r = 0; r < padded; r += kLanes) {
        const Vec v = load(squares + r);
        store(squares + r, v > cutoff ? Vec{} : exp(kernel.relative_logit<VecMath>(v, nearest)));
      }
    }
    for (int r = count; r < padded; ++r) squares[r] = 0;
    Vec sum = {};
    for (int r = 0; r < padded; r += kLanes) sum += load(squares + r);
    state.sum += reduce_add(sum);
    return true;
  }
};

// A query's sums over one part of the references.
struct Part {
  OnlineState state;
  int64_t anchor;
};

template <class Block>
void forward_tile(const FieldParams& p, const int64_t* rows, int size, int64_t begin, int64_t end,
                  double* scratch, Part* parts, double* displacements) {
  const int64_t ld = round_up(p.dim, kPad), step = Block::rows(p.dim);
  Query queries[kTile];
  for (int q = 0; q < size; ++q) queries[q].start(p, rows[q], displacements + q * ld);

  Block block(scratch, p.dim);
  double squares[kGroup][kMaxRows];
  for (int64_t first = begin; first < end; first += step) {
    block.load(p, first, clamp_size(end - first, step));
    for (int group = 0; group < size; group += kGroup) {
      const double* x[kGroup];
      for (int q = 0; q < kGroup; ++q) x[q] = queries[group + q < size ? group + q : group].x;
      block.distances(x, squares);
      for (int q = 0; q < kGroup && group + q < size; ++q) {
        Query& query = queries[group + q];
        query.admit(squares[q], first, block.count, block.padded, ld);
        if (query.weigh(squares[q], block.count, block.padded)) {
          block.gather(query.x, squares[q], query.displacement);
        }
      }
    }
  }
  for (int q = 0; q < size; ++q) parts[q] = {queries[q].state, queries[q].anchor};
}

// Combines the parts of query b, a tile apart, and normalises.
void combine(const FieldParams& p, int64_t b, const Part* parts, const double* displacements,
             int64_t num_parts) {
  const int64_t ld = round_up(p.dim, kPad);
  const RadialKernel kernel(p.half_k, p.t[b]);
  OnlineState state = parts[0].state;
  int64_t anchor = parts[0].anchor;
  double* displacement = p.displacement + b * ld;
  for (int64_t c = 0; c < ld; ++c) displacement[c] = displacements[c];
  for (int64_t i = 1; i < num_parts; ++i) {
    const Part& part = parts[i * kTile];
    const double* other = displacements + i * kTile * ld;
    if (part.state.nearest < state.nearest) anchor = part.anchor;
    const auto factors = state.merge(part.state, kernel);
    for (int64_t c = 0; c < ld; ++c) {
      displacement[c] = factors.own * displacement[c] + factors.theirs * other[c];
    }
  }
  for (int64_t c = 0; c < ld; ++c) displacement[c] /= state.sum;
  p.anchor[b] = anchor;
  p.log_mass[b] = kernel.logit(state.nearest) + ::log(state.sum);
  p.anchor_log_weight[b] = -::log(state.sum);
}

}  // namespace

void PFGM_ISA::exact_forward(const FieldParams& p, Rows rows) {
  if (rows.size == 0) return;
  const Shares shares = exact_shares(p, rows.size);
  const int64_t ld = round_up(p.dim, kPad), scratch_size = block_size(p.dim);
  const Buffer<double> scratch(p.num_threads * scratch_size);
  const Buffer<double> displacements(shares.size() * kTile * ld);
  const Buffer<Part> parts(shares.size() * kTile);
  const auto tile = p.dim <= kMaxColumnDim ? forward_tile<ColumnBlock> : forward_tile<RowBlock>;
  parallel_for(p.num_threads, shares.count(), [&](int64_t share, int thread) {
    shares.for_pieces(share, [&](int64_t n) {
      const Piece& piece = shares.pieces[n];
      const int64_t start = piece.tile * kTile, out = n * kTile;
      const int size = clamp_size(rows.size - start, kTile);
      int64_t index[kTile];
      for (int q = 0; q < size; ++q) index[q] = rows[start + q];
      tile(p, index, size, piece.first, piece.last, scratch.get() + thread * scratch_size,
           parts.get() + out, displacements.get() + out * ld);
    });
  });
  parallel_for(p.num_threads, rows.size, [&](int64_t i, int) {
    const int64_t* ends = shares.tiles.data() + i / kTile;
    const int64_t from = ends[0] * kTile + i % kTile;
    combine(p, rows[i], parts.get() + from, displacements.get() + from * ld, ends[1] - ends[0]);
  });
}

}  // namespace pfgm
