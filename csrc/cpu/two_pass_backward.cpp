// SPDX-License-Identifier: Apache-2.0
// Gradients for x and t (exact_backward.cpp) for larger d and float32 queries, in two passes as in
// two_pass_forward.cpp. For the queries of the second pass, with g' = g / about the largest |g|,
//
//   c_j ∝ w_j (g'·y_j + K) s_a / s_j,   Σ_j c_j (x0_j − x) ∝ unit Σ_j c_j y_j + (origin − x) Σ_j
//   c_j
//
// where K holds all of a_j that does not depend on j, in double.
#include "dense.h"
#include "screen_products.h"

namespace pfgm {
namespace {

// The coefficients c_j of the queries of a second pass, in place of the products.
struct Pull {
  const SecondPass& pass;
  const FieldParams& p;
  const Tiles& tiles;
  Buffer<float> cotangents;  // g' packed, (dim, width) for each tile
  // (padded,) K to twice the digits, for it nearly cancels g'·y; and the anchors' log weights.
  Buffer<float> constants, corrections, masses;
  Buffer<double> moments;  // (blocks, padded) Σ c u over a block, for the Gaussian kernel

  explicit Pull(const SecondPass& pass)
      : pass(pass),
        p(pass.p),
        tiles(pass.tiles),
        cotangents(tiles.padded() * p.dim),
        constants(tiles.padded()),
        corrections(tiles.padded()),
        masses(tiles.padded()),
        moments(pass.num_blocks * tiles.padded()) {
    std::fill_n(constants.get(), tiles.padded(), 0.0f);
    std::fill_n(corrections.get(), tiles.padded(), 0.0f);
    std::fill_n(masses.get(), tiles.padded(), 0.0f);
  }

  void run() const {
    const Buffer<float> decoded(p.num_threads * kGatherRows * kColumnBlock);
    const Buffer<float> projections(p.num_threads * kGatherRows * tiles.padded());
    parallel_for(p.num_threads, pass.num_blocks, [&](int64_t block, int thread) {
      const int64_t first = block * kGatherRows, rows = std::min(p.count - first, kGatherRows);
      float* y = decoded.get() + thread * kGatherRows * kColumnBlock;
      float* out = projections.get() + thread * kGatherRows * tiles.padded();
      for (int64_t column = 0; column < p.dim; column += kColumnBlock) {
        const int64_t columns = std::min<int64_t>(p.dim - column, kColumnBlock);
        decode_block(p, pass.o, first, rows, column, columns, y, kColumnBlock);
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          const int64_t width = tiles.width(tile), start = tile * kTileQueries;
          product<FloatProduct>(y, rows, kColumnBlock, 1,
                                cotangents.get() + start * p.dim + column * width, width, columns,
                                out + start * kGatherRows, column > 0);
        }
      }
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        coefficients(tile, block, out + tile * kTileQueries * kGatherRows);
      }
    });
  }

  void coefficients(int64_t tile, int64_t block, const float* projections) const {
    const int64_t width = tiles.width(tile), first = block * kGatherRows;
    const int64_t last = std::min(p.count, first + kGatherRows);
    bool any = false;
    for (int64_t q = 0; q < width; q += kFloatLanes) {
      const int64_t i = tile * kTileQueries + q;
      const VecF cutoff = load(pass.anchors.cutoff.get() + i);
      const VecF constant = load(constants.get() + i);
      const VecF correction = load(corrections.get() + i), mass = load(masses.get() + i);
      VecF sum = {}, moment = {}, mass_here = {};
      for (int64_t j = first; j < last; ++j) {
        float* products = pass.screen.tile_products(tile) + j * width + q;
        const VecF u = pass.arguments(products, j, i);
        const VecF logits = relative_logits(p, u);
        const VecF weights = logits < cutoff ? VecF{} : exp(logits + mass);
        const VecF a = load(projections + (j - first) * width + q) + constant + correction;
        const VecF c = p.half_k == INFINITY ? weights * a : weights * a / (1.0f + u);
        const VecF finite = weights == 0.0f ? VecF{} : c;
        store(products, finite);
        sum += finite;
        moment += finite * u;
        mass_here += weights;
      }
      pass.put_block_sums(block, i, sum);
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        moments[block * tiles.padded() + i + lane] = moment[lane];
        any |= mass_here[lane] != 0;
      }
    }
    pass.active[tile * pass.num_blocks + block] = any;
  }

  double total_moment(int64_t i) const {
    double sum = 0;
    for (int64_t block = 0; block < pass.num_blocks; ++block) {
      sum += moments[block * tiles.padded() + i];
    }
    return sum;
  }
};

struct Backward {
  const FieldParams& p;
  const Operands& o;
  const RowReader reader{p};
  uint8_t* uncertified;

  void run(const Tiles& tiles) {
    Screen screen(p, o, tiles);
    std::vector<Candidates> candidates(p.batch);
    const bool integers = screen_references(screen);
    const Tiles dense = finish_sparse(screen, integers, candidates);
    if (dense.rows.empty()) return;
    if (!integers && dense.rows.size() == tiles.rows.size())
      return finish_dense(screen, candidates);
    Screen rest(p, o, dense);
    compact(screen, rest);
    screen.products = Buffer<float>();
    for (const int64_t b : dense.rows) rest.bounds[b] = screen.bounds[b];
    if (integers) {
      refine(rest, candidates);
      finish_sparse(rest, false, candidates);
    }
    finish_dense(rest, candidates);
  }

  // How far below the anchor's logit those lie that count.
  double depth(int64_t b) const { return cutoff_depth(p) + p.anchor_log_weight[b]; }

  // Finishes the queries with few candidates and returns the others.
  Tiles finish_sparse(const Screen& screen, bool integers, std::vector<Candidates>& candidates) {
    std::vector<double> limits(p.batch);
    for (const int64_t b : screen.tiles.rows) {
      const RadialKernel kernel(p.half_k, p.t[b]);
      const double s = kernel.gaussian ? p.anchor_s[b] + depth(b) / kernel.inverse_two_t2
                                       : p.anchor_s[b] * ::exp(depth(b) / p.half_k);
      limits[b] = s / (o.unit * o.unit) - screen.bounds[b].offset;
    }
    select(screen, integers, limits.data(), few_candidates(p), candidates);
    Tiles dense;
    std::vector<SparseQuery> sparse;
    for (const int64_t b : screen.tiles.rows) {
      if (candidates[b].too_many) {
        dense.rows.push_back(b);
      } else {
        sparse.push_back({b, &candidates[b].list, {}});
      }
    }
    sparse_backward(p, reader, sparse);
    return dense;
  }

  // Whether float sums of y resolve what the distances weigh: gradients are held to 1e-5.
  bool resolves(int64_t b) const {
    const double offset = RadialKernel(p.half_k, p.t[b]).s_offset(p.t[b]);
    const double distance = ::sqrt(std::max(0.0, p.anchor_s[b] - offset));
    return distance >= o.unit * o.radius / 64;
  }

  void finish_dense(const Screen& screen, const std::vector<Candidates>& candidates) {
    const Tiles& tiles = screen.tiles;
    const int64_t size = static_cast<int64_t>(tiles.rows.size());
    Anchors anchors(tiles.padded());
    bool any = false;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t b = tiles.rows[i];
      if (!candidates[b].too_many) continue;
      uncertified[b] = !certify(p, o, b, screen.bounds[b], p.anchor_s[b]) || !resolves(b);
      if (uncertified[b]) continue;
      anchors.set(p, o, screen.bounds[b], i, b, p.anchor_s[b], depth(b));
      any = true;
    }
    if (!any) return;
    const SecondPass pass(screen, anchors);
    const Pull pull(pass);
    std::vector<double> scales(size);
    parallel_for(p.num_threads, tiles.count(),
                 [&](int64_t tile, int) { pack(pull, tile, scales); });
    pull.run();
    const Buffer<double> sums(size * p.dim);
    pass.gather(sums.get());
    parallel_for(p.num_threads, size, [&](int64_t i, int) {
      if (anchors.cutoff[i] < 0) {
        finish(tiles.rows[i], scales[i], pass.total(i), pull.total_moment(i),
               sums.get() + i * p.dim);
      }
    });
  }

  // g', K and what they are to be multiplied by, for the queries of a tile.
  void pack(const Pull& pull, int64_t tile, std::vector<double>& scales) const {
    const int64_t ld = round_up(p.dim, kPad);
    for (int q = 0; q < pull.tiles.size(tile); ++q) {
      const int64_t b = pull.tiles.row(tile, q), i = tile * kTileQueries + q;
      const double *g = p.grad_displacement + b * ld, *x = p.x + b * ld;
      double largest = 0, shift = 0;
      for (int64_t c = 0; c < p.dim; ++c) {
        largest = std::max(largest, std::abs(g[c]));
        shift += g[c] * (o.origin[c] - x[c]);
      }
      const double constant = shift - p.projection[b] + p.grad_log_mass[b];
      const double scale = std::max(largest * o.unit, std::abs(constant) * 1e-6);
      scales[i] = scale > 0 ? scale : 1;
      pull.constants[i] = static_cast<float>(constant / scales[i]);
      pull.corrections[i] = static_cast<float>(constant / scales[i] - pull.constants[i]);
      pull.masses[i] = static_cast<float>(p.anchor_log_weight[b]);
    }
    double residuals[kTileQueries];
    const auto value = [&](int64_t i, int64_t c) {
      return p.grad_displacement[pull.tiles.rows[i] * ld + c] * o.unit / scales[i];
    };
    pack_floats(pull.tiles, tile, p.dim, value, pull.cotangents.get() + tile * kTileQueries * p.dim,
                residuals);
  }

  void finish(int64_t b, double scale, double total, double moment, const double* sums) const {
    const int64_t ld = round_up(p.dim, kPad);
    const RadialKernel kernel(p.half_k, p.t[b]);
    const double* x = p.x + b * ld;
    const double slope = kernel.gaussian ? kernel.inverse_two_t2 : p.half_k / p.anchor_s[b];
    double* dx = p.dx + b * ld;
    std::fill(dx, dx + ld, 0.0);
    for (int64_t c = 0; c < p.dim; ++c) {
      dx[c] = 2 * slope * scale * (o.unit * sums[c] + total * (o.origin[c] - x[c]));
    }
    // For the Gaussian kernel s = s_a + 2t² u.
    const double gaussian = p.anchor_s[b] * total + moment / kernel.inverse_two_t2;
    p.dt[b] = slope * scale * (kernel.gaussian ? 2 / p.t[b] * gaussian : -2 * p.t[b] * total);
  }
};

}  // namespace

void PFGM_ISA::two_pass_backward_queries(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles usable;
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool singular = p.half_k != INFINITY && p.anchor_s[b] == 0;
    uncertified[b] = singular || !in_range(p, operands, b);
    if (!uncertified[b]) usable.rows.push_back(b);
  }
  if (!usable.rows.empty()) Backward{p, operands, RowReader(p), uncertified}.run(usable);
}

}  // namespace pfgm
