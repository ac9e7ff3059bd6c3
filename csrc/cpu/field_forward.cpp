// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), in one pass over the references:
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
//
// Threads take tiles of queries; where these are too few, the references are shared out as well,
// in num_splits parts whose states are combined at the end.
#include "../field_math.h"
#include "blocks.h"
#include "kernels.h"

namespace pfgm {
namespace {

// One query's running sum over the references of its split.
struct Query {
  RadialKernel kernel;
  OnlineState state;
  double offset;                      // what t adds to s
  double cutoff_ratio, cutoff_shift;  // no weight where s > cutoff_ratio · nearest + cutoff_shift
  int64_t anchor;
  const double* x;
  double* displacement;

  void start(const FieldParams& p, int64_t b, int split) {
    const int64_t ld = round_up(p.dim, kPad);
    kernel = RadialKernel(p.half_k, p.t[b]);
    state = OnlineState();
    offset = kernel.s_offset(p.t[b]);
    const double depth = kCutoff + ::log(static_cast<double>(p.count));
    cutoff_ratio = kernel.gaussian ? 1.0 : ::exp(depth / p.half_k);
    cutoff_shift = kernel.gaussian ? depth / kernel.inverse_two_t2 : 0.0;
    anchor = 0;
    x = p.x + b * ld;
    displacement = p.displacement + (split * p.batch + b) * ld;
    for (int64_t c = 0; c < ld; ++c) displacement[c] = 0;
  }

  // Turns squared distances into s in place and admits the nearest of them.
  void admit(double* s, int64_t first, int count, int padded, int64_t ld) {
    for (int r = count; r < padded; ++r) s[r] = s[0];
    Vec minima = broadcast(INFINITY);
    for (int r = 0; r < padded; r += kLanes) {
      Vec v = load(s + r) + offset;
      v += v - v;  // an infinite s becomes NaN: it must not pass for a small weight
      store(s + r, v);
      minima = v < minima ? v : minima;
    }
    double nearest = minima[0];
    for (int i = 1; i < kLanes; ++i) nearest = minima[i] < nearest ? minima[i] : nearest;
    if (!(nearest < state.nearest)) return;
    for (int r = count - 1; r >= 0; --r) anchor = s[r] == nearest ? first + r : anchor;
    const double factor = state.update(nearest, kernel);
    for (int64_t c = 0; c < ld; ++c) displacement[c] *= factor;
  }

  // Turns s into weights relative to the nearest, in place, and adds them up; returns whether any
  // is not zero.
  bool weigh(double* s, int count, int padded) {
    const double cutoff = state.nearest * cutoff_ratio + cutoff_shift;
    VecInt active = {};
    for (int r = 0; r < padded; r += kLanes) active |= ~(VecInt)(load(s + r) > cutoff);
    int64_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= active[i];
    if (!any) return false;
    if (state.nearest > 0) {
      const Vec nearest = broadcast(state.nearest);
      for (int r = 0; r < padded; r += kLanes) {
        const Vec v = load(s + r);
        store(s + r, v > cutoff ? Vec{} : exp(kernel.relative_logit<VecMath>(v, nearest)));
      }
    } else {
      for (int r = 0; r < count; ++r) s[r] = kernel.relative_weight(s[r], state.nearest);
    }
    for (int r = count; r < padded; ++r) s[r] = 0;
    Vec sum = {};
    for (int r = 0; r < padded; r += kLanes) sum += load(s + r);
    state.sum += reduce_add(sum);
    return true;
  }
};

template <class Block>
void forward_tile(const FieldParams& p, int64_t b, int size, int split, double* scratch) {
  const int64_t ld = round_up(p.dim, kPad), rows = Block::rows(p.dim);
  const int64_t begin = p.count * split / p.num_splits, end = p.count * (split + 1) / p.num_splits;
  Query queries[kTile];
  for (int q = 0; q < size; ++q) queries[q].start(p, b + q, split);

  Block block(scratch, p.dim);
  double s[kGroup][kMaxRows];
  for (int64_t first = begin; first < end; first += rows) {
    block.load(p, first, clamp_size(end - first, rows));
    for (int group = 0; group < size; group += kGroup) {
      const double* x[kGroup];
      for (int q = 0; q < kGroup; ++q) x[q] = queries[group + q < size ? group + q : group].x;
      block.distances(x, s);
      for (int q = 0; q < kGroup && group + q < size; ++q) {
        Query& query = queries[group + q];
        query.admit(s[q], first, block.count, block.padded, ld);
        if (query.weigh(s[q], block.count, block.padded)) {
          block.gather(query.x, s[q], query.displacement);
        }
      }
    }
  }
  for (int q = 0; q < size; ++q) {
    const int64_t out = split * p.batch + b + q;
    p.nearest[out] = queries[q].state.nearest;
    p.sum[out] = queries[q].state.sum;
    p.anchor[out] = queries[q].anchor;
  }
}

// Combines the states of the splits of query b into split 0 and normalises.
void combine(const FieldParams& p, int64_t b) {
  const int64_t ld = round_up(p.dim, kPad);
  const RadialKernel kernel(p.half_k, p.t[b]);
  OnlineState state;
  state.nearest = p.nearest[b];
  state.sum = p.sum[b];
  double* displacement = p.displacement + b * ld;
  for (int split = 1; split < p.num_splits; ++split) {
    const int64_t part = split * p.batch + b;
    OnlineState other;
    other.nearest = p.nearest[part];
    other.sum = p.sum[part];
    if (other.nearest < state.nearest) p.anchor[b] = p.anchor[part];
    const auto factors = state.merge(other, kernel);
    for (int64_t c = 0; c < ld; ++c) {
      displacement[c] =
          factors.own * displacement[c] + factors.theirs * p.displacement[part * ld + c];
    }
  }
  for (int64_t c = 0; c < ld; ++c) displacement[c] /= state.sum;
  p.log_mass[b] = kernel.logit(state.nearest) + ::log(state.sum);
  p.anchor_log_weight[b] = -::log(state.sum);
}

}  // namespace

void PFGM_ISA::field_forward(const FieldParams& p) {
  const int64_t tile = tile_size(p), tiles = (p.batch + tile - 1) / tile;
#pragma omp parallel for schedule(dynamic) num_threads(p.num_threads)
  for (int64_t task = 0; task < tiles * p.num_splits; ++task) {
    const int64_t b = task % tiles * tile;
    const int size = clamp_size(p.batch - b, tile);
    const int split = static_cast<int>(task / tiles);
    if (p.dim <= kMaxColumnDim) {
      forward_tile<ColumnBlock>(p, b, size, split, thread_scratch(p));
    } else {
      forward_tile<RowBlock>(p, b, size, split, thread_scratch(p));
    }
  }
#pragma omp parallel for num_threads(p.num_threads)
  for (int64_t b = 0; b < p.batch; ++b) combine(p, b);
}

}  // namespace pfgm
