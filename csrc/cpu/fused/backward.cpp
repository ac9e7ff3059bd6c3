// SPDX-License-Identifier: Apache-2.0
// Gradients for x and t (exact/backward.cpp) for 24 < d ≤ 256 and float32 queries, in one pass
// (fused.h). With g' = g unit / scale, and relative to the anchor's s,
//
//   c_j ∝ exp(−(k/2 + 1) log1p((r_j − r_a)/s_a)) (g'·y_j + K)
//   Σ_j c_j (x0_j − x) ∝ unit Σ_j c_j y_j + (origin − x) Σ_j c_j
//
// where K holds all of a_j that does not depend on j, in double. For the Gaussian kernel the weight
// is exp(−u), and s_j = s_a + 2t² u_j. In forward mode (common/pull.h) the c_j are of
// (g'·y_j + K − κ' u_j).
#include "fused.h"

namespace pfgm {
namespace {

// The sums of light references may be off by this much, relative to the distance.
constexpr double kFusedPull = 1e-6;
constexpr double kPullTolerance = 1e-5;  // of logits: four times the root mean square of the error
// References with more than this share of the weight, or of what a heavy anchor leaves of it, are
// taken by direct differences.
constexpr double kHeavyPull = 1.0 / 32;
constexpr double kLeastLeft = 1e-12;     // by which `precise` still notices logits that are far off
constexpr double kLeastLogWeight = -40;  // of an anchor that is near the nearest reference

// Σ c and Σ c u.
struct PullSums {
  double total = 0, moment = 0;
};

// One tile of queries over one part of the references.
struct PullTile {
  const FusedPass& pass;
  const FieldParams& p;
  int64_t width;
  LogitScale scale;

  float shift[kTileQueries], inverse[kTileQueries];  // u = (r − shift) inverse
  float correction[kTileQueries];
  float limit[kTileQueries], heavy[kTileQueries];  // largest r that counts, and of heavy references
  float constant[kTileQueries],
      rest[kTileQueries];       // K to twice the digits: it nearly cancels g'·y
  float tilt[kTileQueries];     // κ'
  double factor[kTileQueries];  // takes what is summed to Σ c (x0 − x)
  double level[kTileQueries];   // squared distance at `shift`
  PullSums sums[kTileQueries];
  std::vector<int32_t> lists[kTileQueries];  // of the heavy references

  PullTile(const FusedPass& pass, int64_t tile)
      : pass(pass), p(pass.p), width(pass.tiles.width(tile)), scale(p.half_k + 1) {
    for (int q = 0; q < kTileQueries; ++q) {
      shift[q] = inverse[q] = correction[q] = constant[q] = rest[q] = tilt[q] = 0;
      limit[q] = heavy[q] = -INFINITY;
      factor[q] = level[q] = 0;
    }
  }

  // Lets query q take part: what r may be for a weight that counts and for a heavy one, and K for
  // a g that was multiplied by value.
  void set(int q, int64_t b, const FusedQuery& query, float most, float least, double k,
           double value) {
    const double square = pass.o.unit * pass.o.unit;
    shift[q] = static_cast<float>(p.anchor_square[b] / square - query.offset);
    level[q] = (double{shift[q]} + query.offset) * square;
    const RadialKernel& kernel = query.kernel;
    const double exact =
        scale.gaussian ? kernel.inverse_two_t2 * square : square / (level[q] + kernel.offset);
    inverse[q] = static_cast<float>(exact);
    correction[q] = scale.correction(p.half_k + 1, exact, inverse[q]);
    limit[q] = most;
    heavy[q] = least;
    tilt[q] = static_cast<float>(TotalPull(p, b).tilt * value);
    constant[q] = static_cast<float>(k);
    rest[q] = static_cast<float>(k - constant[q]);
    const double log_weight =
        p.anchor_log_weight[b] - kernel.relative_logit<ScalarMath>(p.anchor_square[b], level[q]);
    factor[q] = kernel.slope(level[q]) * ::exp(log_weight) / value;
  }

  // Lists the heavy references of a block and moves them out of reach.
  void list_heavy(float* r, int64_t first, int64_t count) {
    for (int64_t v = 0; v < width; v += kFloatLanes) {
      const VecF most = load(heavy + v);
      for (int64_t j = 0; j < count; ++j) {
        const VecF value = load(r + j * width + v);
        const unsigned mask = bits(value <= most);
        if (!mask) continue;
        store(r + j * width + v, value <= most ? broadcast(kMostU) : value);
        for (unsigned left = mask; left; left &= left - 1) {
          lists[v + __builtin_ctz(left)].push_back(static_cast<int32_t>(first + j));
        }
      }
    }
  }

  // r of a block becomes c, with g'·y in projections. Returns whether any weight counts.
  bool weigh(float* r, const float* projections, int64_t count) {
    bool any = false;
    for (int64_t v = 0; v < width; v += kFloatLanes) {
      CompensatedSum total, moment;
      VecFInt counts = {};
      int64_t j = 0;
      for (; j + kWeighRows <= count; j += kWeighRows) {
        weigh_rows<kWeighRows>(r, projections, j * width + v, v, total, moment, counts);
      }
      for (; j < count; ++j) weigh_rows<1>(r, projections, j * width + v, v, total, moment, counts);
      const VecF block_total = total.total(), block_moment = moment.total();
      for (int i = 0; i < kFloatLanes; ++i) {
        sums[v + i].total += block_total[i];
        sums[v + i].moment += block_moment[i];
      }
      any |= bits(counts) != 0;
    }
    return any;
  }

  template <int kRows>
  void weigh_rows(float* r, const float* projections, int64_t at, int64_t v, CompensatedSum& total,
                  CompensatedSum& moment, VecFInt& counts) const {
    VecF u[kRows], weights[kRows];
    VecFInt near[kRows];
    for (int i = 0; i < kRows; ++i) {
      const VecF value = load(r + at + i * width);
      near[i] = value <= load(limit + v);
      u[i] = smaller((value - load(shift + v)) * load(inverse + v), broadcast(kMostU));
      counts |= near[i];
    }
    for (int i = 0; i < kRows; ++i) weights[i] = scale.logits(u[i], load(correction + v));
    for (int i = 0; i < kRows; ++i) weights[i] = near[i] ? exp_normal(weights[i]) : VecF{};
    for (int i = 0; i < kRows; ++i) {
      const VecF a = load(projections + at + i * width) + load(constant + v) + load(rest + v);
      const VecF c = weights[i] * (a - load(tilt + v) * u[i]);
      store(r + at + i * width, c);
      total.add(c);
      moment.add(c * u[i]);
    }
  }
};

struct FusedBackward : FusedPass {
  uint8_t* uncertified;
  std::vector<PullSums> partials{static_cast<size_t>(shares.size() * kTileQueries)};

  FusedBackward(const FieldParams& p, const Operands& o, const Tiles& tiles, uint8_t* uncertified)
      : FusedPass(p, o, tiles), uncertified(uncertified) {}

  void run() {
    parallel_for(p.num_threads, shares.count(), [&](int64_t share, int thread) {
      shares.for_pieces(share, [&](int64_t piece) { run_piece(piece, areas[thread]); });
    });
    std::vector<int64_t> rest;
    for (int64_t i = 0; i < size; ++i) {
      if (certify(i)) {
        combine(i);
      } else {
        rest.push_back(i);
      }
    }
    finish_sparse(
        rest, uncertified, p.grad_displacement,
        [&](int64_t i) { return limit(i, cutoff_depth(p), queries[i].error); },
        finish_sparse_backward);
  }

  // Weight that the anchor leaves to other references, if it is heavy.
  double left(int64_t b) const {
    const double weight = ::exp(p.anchor_log_weight[b]);
    return weight > kHeavyPull ? std::max(kLeastLeft, 1 - weight) : 1;
  }

  // Whether float is precise enough for the weights, the projections and the sums.
  bool certify(int64_t i) const {
    const int64_t b = tiles.rows[i];
    const double distance = ::sqrt(p.anchor_square[b]), light = left(b);
    const double lost = kFloatRounding * o.unit * o.radius;
    // √Σ w² over Σ w of the light references, at most, copies being one, whose errors add up.
    const double largest = std::min(kHeavyPull, ::exp(p.anchor_log_weight[b]) / light);
    const double share = ::sqrt(std::min(1.0, largest * o.copies));
    return p.anchor_log_weight[b] >= kLeastLogWeight && lost <= kFusedPull * distance &&
           precise(i, light, share) &&
           resolves_pull(p, o, b, distance, o.radius, sum_depth(p.dim), light * share);
  }

  // Whether the logits of the light references, relative to the anchor's, are precise enough.
  bool precise(int64_t i, double light, double share) const {
    const int64_t b = tiles.rows[i];
    const double square = o.unit * o.unit, anchor = p.anchor_square[b] / square - queries[i].offset;
    const double slope = queries[i].kernel.slope(p.anchor_square[b]) * square;
    const double apart = rounding(i, (std::abs(anchor) + spread) / 2) * share;
    const double alike = 2 * queries[i].bound.residual * o.radius;
    // How much of the gradient is theirs: g·(x0_j − x − v) may vanish for the anchor.
    const double pull = 4 * slope * o.radius * ::sqrt(p.anchor_square[b] / square);
    const double theirs = std::min(1.0, light * std::max(1.0, pull));
    return slope * (4 * apart + alike) * theirs <= kPullTolerance;
  }

  // r of a reference whose weight is exp(−depth), or at most that where there is an error.
  float limit(int64_t i, double depth, double error) const {
    const int64_t b = tiles.rows[i];
    const FusedQuery& query = queries[i];
    depth += p.anchor_log_weight[b];
    const double most = farthest_r(p, o, b, query.offset, p.anchor_square[b], depth) + error;
    return std::nextafter(static_cast<float>(most), INFINITY);
  }

  // K for query i of the pass, and in value what g is multiplied by.
  double constant(int64_t i, double* value) const {
    const int64_t b = tiles.rows[i];
    const double *g = p.grad_displacement + b * ld, *x = p.x + b * ld;
    double largest = 0, sum = p.grad_log_mass[b] - p.projection[b];
    for (int64_t c = 0; c < p.dim; ++c) {
      largest = std::max(largest, std::abs(g[c]));
      sum += g[c] * (o.origin[c] - x[c]);
    }
    const double constants = std::abs(sum) + std::abs(TotalPull(p, b).tilt);
    const double scale = std::max(largest * o.unit, constants * 1e-6);
    *value = scale > 0 ? 1 / scale : 1;
    return sum * *value;
  }

  void run_piece(int64_t n, FusedArea& area) {
    const Piece& piece = shares.pieces[n];
    const int64_t tile = piece.tile;
    const int64_t start = tile * kTileQueries, width = tiles.width(tile);
    const int tile_size = tiles.size(tile);
    PullTile state(*this, tile);
    double values[kTileQueries] = {}, residuals[kTileQueries];
    bool any = false;
    for (int q = 0; q < tile_size; ++q) {
      const double k = constant(start + q, values + q);
      if (!certify(start + q)) continue;
      any = true;
      state.set(q, tiles.row(tile, q), queries[start + q], limit(start + q, cutoff_depth(p), 0),
                limit(start + q, -::log(kHeavyPull * left(tiles.row(tile, q))), 0), k, values[q]);
    }
    if (!any) return;
    const Buffer<float> cotangents(p.dim * width), projections(kFusedRows * width);
    const auto value = [&](int64_t i, int64_t c) {
      return p.grad_displacement[tiles.rows[i] * ld + c] * o.unit * values[i - start];
    };
    pack_floats(tiles, tile, p.dim, value, cotangents.get(), residuals);
    double* totals = area.totals.get();
    std::fill_n(totals, p.dim * width, 0.0);
    for_blocks(tiles, piece, area, [&](FusedBlock& block, float* r, int64_t first) {
      state.list_heavy(r, first, block.rows);
      block.multiply(cotangents.get(), p.dim, width, projections.get());
      if (!state.weigh(r, projections.get(), block.rows) || !p.dx) return;
      block.gather(r, width, area.out.get());
      for (int64_t i = 0; i < p.dim * width; i += kLanes) {
        store(totals + i, load(totals + i) + widen(area.out.get() + i));
      }
    });
    for (int q = 0; q < tile_size; ++q) finish(state, q, n, start + q, totals);
  }

  void finish(const PullTile& state, int q, int64_t piece, int64_t i, const double* totals) {
    const int64_t b = tiles.rows[i];
    const double *x = p.x + b * ld, total = state.sums[q].total, factor = state.factor[q];
    double* out = p.dx ? row(piece, i, p.dx) : nullptr;
    for (int64_t c = 0; out && c < ld; ++c) {
      const double sum =
          c < p.dim ? o.unit * totals[c * state.width + q] + total * (o.origin[c] - x[c]) : 0;
      out[c] = 2 * factor * sum;
    }
    const RadialKernel& kernel = queries[i].kernel;
    const double moment = state.sums[q].moment / kernel.inverse_two_t2;
    PullSums& partial = partials[place(piece, i)];
    partial.total = factor * (TotalPull(p, b).moment ? state.level[q] * total + moment : total);
    for (const int32_t j : state.lists[q]) partial.total += add_pair(i, j, out);
  }

  // Adds 2 c (x0_j − x) in double to out, or null, and returns what j adds to the total.
  double add_pair(int64_t i, int32_t j, double* out) const {
    const int64_t b = tiles.rows[i];
    const RadialKernel& kernel = queries[i].kernel;
    const Pair pair = pair_sums(reader, p.x + b * ld, p.grad_displacement + b * ld, j);
    const double logit = kernel.relative_logit<ScalarMath>(pair.distance, p.anchor_square[b]);
    const double u = kernel.argument(pair.distance, p.anchor_square[b]);
    const TotalPull all(p, b);
    const double a = pair.projection - p.projection[b] + p.grad_log_mass[b] - all.tilt * u;
    const double c =
        ::exp(std::min(0.0, logit + p.anchor_log_weight[b])) * a * kernel.slope(pair.distance);
    if (out) add_row(reader, p.x + b * ld, j, 2 * c, out);
    return all.moment ? c * pair.distance : c;
  }

  void combine(int64_t i) {
    const int64_t b = tiles.rows[i];
    const auto [piece, end] = pieces_of(i);
    double total = partials[place(piece, i)].total;
    for (int64_t n = piece + 1; n < end; ++n) {
      total += partials[place(n, i)].total;
      for (int64_t c = 0; p.dx && c < p.dim; ++c) p.dx[b * ld + c] += row(n, i, p.dx)[c];
    }
    p.dt[b] = total * TotalPull(p, b).factor;
  }
};

}  // namespace

void PFGM_ISA::fused_backward_queries(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool singular = RadialKernel(p.half_k, p.t[b]).singular(p.anchor_square[b]);
    uncertified[b] = operands.alike || singular || !in_range(p, operands, b);
    if (!uncertified[b]) tiles.rows.push_back(b);
  }
  if (!tiles.rows.empty()) FusedBackward(p, operands, tiles, uncertified).run();
}

}  // namespace pfgm
