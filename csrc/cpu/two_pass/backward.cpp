// SPDX-License-Identifier: Apache-2.0
// Gradients for x and t (exact/backward.cpp) for larger d and float32 queries, in the passes of
// two_pass.h. In the second one, with g' = g / about the largest |g|,
//
//   c_j ∝ w_j (g'·y_j + K) s_a / s_j
//   Σ_j c_j (x0_j − x) ∝ unit Σ_j c_j y_j + (origin − x) Σ_j c_j
//
// where K holds all of a_j that does not depend on j, in double. In forward mode (common/pull.h) it
// is g'·y_j + K − κ' u_j.
#include "two_pass.h"

namespace pfgm {
namespace {

// Of coefficients c_j in a sample, root mean square: dx may be off by as much of all it sums.
constexpr double kSampledPull = 7e-6;

// The coefficients c_j of the queries of a second pass, in place of the products.
struct Pull {
  const SecondPass& pass;
  const FieldParams& p = pass.p;
  const Tiles& tiles = pass.tiles;
  Buffer<float> cotangents{tiles.padded() * p.dim};  // g' packed, (dim, width) for each tile
  // (padded,) K to twice the digits, for it nearly cancels g'·y; and the anchors' log weights.
  std::vector<float> constants, corrections, masses;
  std::vector<float> tilts;                                  // (padded,) κ'
  Buffer<double> moments{pass.num_blocks * tiles.padded()};  // as pass.block_sums, of c u
  Buffer<double> sizes{pass.num_blocks * tiles.padded()};    // the same of |c|

  explicit Pull(const SecondPass& pass)
      : pass(pass),
        constants(tiles.padded()),
        corrections(tiles.padded()),
        masses(tiles.padded()),
        tilts(tiles.padded()) {}

  void run() const {
    const Buffer<float> decoded(p.num_threads * kGatherRows * kColumnBlock);
    const Buffer<float> projections(p.num_threads * kGatherRows * tiles.padded());
    parallel_for(p.num_threads, pass.num_blocks, [&](int64_t block, int thread) {
      const int64_t first = block * pass.block_rows;
      const int64_t rows = std::min(p.count - first, pass.block_rows);
      float* y = decoded.get() + thread * kGatherRows * kColumnBlock;
      float* out = projections.get() + thread * kGatherRows * tiles.padded();
      const auto tile_out = [&](int64_t tile) { return out + tile * kTileQueries * kGatherRows; };
      multiply_floats(p, pass.o, tiles, first, rows, y, cotangents.get(), tile_out);
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        coefficients(tile, block, tile_out(tile));
      }
    });
  }

  void coefficients(int64_t tile, int64_t block, const float* projections) const {
    const int64_t width = tiles.width(tile), first = block * pass.block_rows;
    const int64_t last = std::min(p.count, first + pass.block_rows);
    bool any = false;
    for (int64_t q = 0; q < width; q += kFloatLanes) {
      const int64_t i = tile * kTileQueries + q;
      const VecF cutoff = load(&pass.anchors.cutoff[i]);
      const VecF constant = load(&constants[i]);
      const VecF correction = load(&corrections[i]), mass = load(&masses[i]);
      const VecF tilt = load(&tilts[i]);
      CompensatedSum sum, moment;
      VecF size = {};
      for (int64_t j = first; j < last; ++j) {
        float* products = pass.screen.tile_products(tile) + j * width + q;
        const VecF u = pass.arguments(products, i);
        const VecF logits = relative_logits(p, u);
        const VecF weights = logits < cutoff ? VecF{} : exp(logits + mass);
        const VecF a = load(projections + (j - first) * width + q) + constant + correction;
        const VecF pull = weights * (a - tilt * u);
        const VecF c = p.half_k == INFINITY ? pull : pull / (1.0f + u);
        const VecF finite = weights == 0.0f ? VecF{} : c;
        store(products, finite);
        sum.add(finite);
        moment.add(finite * u);
        size += finite < 0.0f ? -finite : finite;
      }
      pass.put(pass.block_sums, block, i, sum.total());
      pass.put(moments, block, i, moment.total());
      pass.put(sizes, block, i, size);
      any |= bits(size != 0.0f) != 0;
    }
    pass.active[tile * pass.num_blocks + block] = any;
  }
};

struct Backward : TwoPass {
  using TwoPass::TwoPass;

  bool usable(int64_t b) const override {
    return !RadialKernel(p.half_k, p.t[b]).singular(p.anchor_square[b]) && TwoPass::usable(b);
  }

  double depth(int64_t b) const override { return cutoff_depth(p) + p.anchor_log_weight[b]; }

  bool limited_by_smallest() const override { return false; }

  // The anchor is that of all chunks and shards.
  bool may_have_none() const override { return true; }

  double limit(const Bound& bound, int64_t b, double) const override {
    return farthest_r(p, o, b, bound.offset, p.anchor_square[b], depth(b));
  }

  void finish_sparse(std::vector<SparseQuery>& queries) const override {
    finish_all(reader, p.grad_displacement, queries,
               [&](const SparseQuery& query) { finish_sparse_backward(p, reader, query); });
  }

  double anchor_square(int64_t b, int64_t) const override { return p.anchor_square[b]; }

  // Float sums of y must resolve what the distances weigh: gradients are held to 1e-5.
  bool resolved(int64_t b, int64_t nearest, double square) const override {
    const double norm = o.alike ? o.radius : o.roots[nearest];
    const double together = o.alike ? 1 : ::exp(p.anchor_log_weight[b] / 2);
    return ::sqrt(square) >= resolved_distance(o, 64) &&
           resolves_pull(p, o, b, ::sqrt(square), norm, kColumnBlock, together);
  }

  void finish_dense(const SecondPass& pass) const override {
    Pull pull(pass);
    std::vector<double> scales(pass.tiles.rows.size());
    parallel_for(p.num_threads, pass.tiles.count(),
                 [&](int64_t tile, int) { pack(pull, tile, scales); });
    pull.run();
    const Buffer<double> sums = p.dx ? pass.gather() : Buffer<double>();
    pass.for_queries([&](int64_t i, int64_t b) {
      const double total = pass.total(pass.block_sums, i);
      uncertified[b] = !agrees(pull, i, b, scales[i]);
      finish_total(b, scales[i], total, pass.total(pull.moments, i));
      if (p.dx) finish_pull(b, scales[i], total, sums.get() + i * p.dim);
    });
  }

  // Whether coefficients in a sample are what direct differences give, as far as a gradient shows.
  bool agrees(const Pull& pull, int64_t i, int64_t b, double scale) const {
    const int64_t ld = round_up(p.dim, kPad);
    const double *g = p.grad_displacement + b * ld, *x = p.x + b * ld;
    const RadialKernel kernel(p.half_k, p.t[b]);
    const double slope = kernel.slope(p.anchor_square[b]);
    const TotalPull total(p, b);
    const Errors errors = pull.pass.sample(pull.sizes, i, [&](int64_t j, double c) {
      const Pair pair = pair_sums(reader, x, g, j);
      return pair_coefficient(p, b, kernel, total, pair) / (slope * scale) / c - 1;
    });
    const double size = 2 * slope * scale * pull.pass.total(pull.sizes, i);
    const double dx = size * ::sqrt(p.anchor_square[b]);
    double square = 0;
    for (int64_t c = 0; c < p.dim; ++c) square += g[c] * g[c];
    return errors.root_mean_square * dx <= kSampledPull * (dx + ::sqrt(square));
  }

  // g', K and what they are to be multiplied by, for the queries of a tile.
  void pack(Pull& pull, int64_t tile, std::vector<double>& scales) const {
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
      const double tilt = TotalPull(p, b).tilt, constants = std::abs(constant) + std::abs(tilt);
      const double scale = std::max(largest * o.unit, constants * 1e-6);
      scales[i] = scale > 0 ? scale : 1;
      pull.constants[i] = static_cast<float>(constant / scales[i]);
      pull.corrections[i] = static_cast<float>(constant / scales[i] - pull.constants[i]);
      pull.tilts[i] = static_cast<float>(tilt / scales[i]);
      pull.masses[i] = static_cast<float>(p.anchor_log_weight[b]);
    }
    double residuals[kTileQueries];
    const auto value = [&](int64_t i, int64_t c) {
      return p.grad_displacement[pull.tiles.rows[i] * ld + c] * o.unit / scales[i];
    };
    pack_floats(pull.tiles, tile, p.dim, value, pull.cotangents.get() + tile * kTileQueries * p.dim,
                residuals);
  }

  void finish_pull(int64_t b, double scale, double total, const double* sums) const {
    const int64_t ld = round_up(p.dim, kPad);
    const double* x = p.x + b * ld;
    const double slope = RadialKernel(p.half_k, p.t[b]).slope(p.anchor_square[b]);
    double* dx = p.dx + b * ld;
    std::fill(dx, dx + ld, 0.0);
    for (int64_t c = 0; c < p.dim; ++c) {
      dx[c] = 2 * slope * scale * (o.unit * sums[c] + total * (o.origin[c] - x[c]));
    }
  }

  void finish_total(int64_t b, double scale, double total, double moment) const {
    const RadialKernel kernel(p.half_k, p.t[b]);
    const double slope = kernel.slope(p.anchor_square[b]);
    // For the Gaussian kernel s = s_a + 2t² u.
    const double squares = p.anchor_square[b] * total + moment / kernel.inverse_two_t2;
    const TotalPull all(p, b);
    p.dt[b] = slope * scale * all.factor * (all.moment ? squares : total);
  }
};

}  // namespace

void PFGM_ISA::two_pass_backward_queries(const FieldParams& p, uint8_t* uncertified) {
  Backward(p, uncertified).run();
}

}  // namespace pfgm
