// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), for larger d and float32 queries, in two passes:
//
//   1. products of queries and references bound every s_j (screen.h); queries that few references
//      can carry weight for are finished by direct differences in double (sparse.h);
//   2. for the others logit_j = −(k/2) log1p((s_j − s_a)/s_a) relative to an anchor a near the
//      nearest, with s_a exactly, and Σ_j w_j (x0_j − x) by a second product (dense.h). References
//      that hold much of the weight are again taken by direct differences.
#include "dense.h"
#include "screen_products.h"

namespace pfgm {
namespace {

// Candidates up to which a query is finished by direct differences, of `count` references.
constexpr int64_t kFewCandidates = 64;
constexpr int64_t kFewShare = 16;  // and 1/16 of them all
// A reference with more than 1/128 of the weight is taken by direct differences.
constexpr double kHeavy = 1.0 / 128;

struct Forward {
  const FieldParams& p;
  const Operands& o;
  const RowReader reader{p};
  uint8_t* uncertified;

  // The queries of `rows`, whose products fit into the workspace.
  void run(const Tiles& tiles) {
    Screen screen(p, o, tiles);
    std::vector<Candidates> candidates(p.batch);
    const int64_t few = std::max(kFewCandidates, p.count / kFewShare);
    const bool integers = screen_all(screen);
    if (integers) {
      select<int32_t>(screen, nullptr, few, candidates);
    } else {
      select<float>(screen, nullptr, few, candidates);
    }
    Tiles dense = finish_sparse(tiles, candidates);
    if (dense.rows.empty()) return;
    if (!integers && dense.rows.size() == tiles.rows.size())
      return finish_dense(screen, candidates);
    Screen rest(p, o, dense);
    compact(screen, rest);
    screen.products = Buffer<float>();
    for (const int64_t b : dense.rows) rest.bounds[b] = screen.bounds[b];
    if (integers) refine(rest, candidates, few);
    finish_dense(rest, candidates);
  }

  // Whether the products are integers.
  bool screen_all(Screen& screen) {
#if defined(PFGM_INTEGER_PRODUCT)
    if (o.codes) {
      screen_integers(screen, nullptr);
      return true;
    }
#endif
    screen_floats(screen);
    return false;
  }

  // More digits, and with their tighter bounds another choice of candidates.
  void refine(Screen& screen, std::vector<Candidates>& candidates, int64_t few) {
#if defined(PFGM_INTEGER_PRODUCT)
    std::vector<double> base(p.batch);
    for (const int64_t b : screen.tiles.rows) {
      // r of the screen holds codes, not y: s is the same.
      base[b] = candidates[b].smallest + screen.bounds[b].offset - true_offset(b);
      candidates[b] = Candidates();
    }
    screen_integers(screen, base.data());
    select<float>(screen, nullptr, few, candidates);
    finish_sparse(screen.tiles, candidates);
#endif
  }

  double true_offset(int64_t b) const {
    const QueryNorms norms = query_norms(p, o, b);
    return norms.squared + norms.t_squared;
  }

  // Finishes the queries with few candidates and returns the others.
  Tiles finish_sparse(const Tiles& tiles, const std::vector<Candidates>& candidates) {
    Tiles dense;
    std::vector<SparseQuery> sparse;
    for (const int64_t b : tiles.rows) {
      if (candidates[b].too_many) {
        dense.rows.push_back(b);
      } else {
        sparse.push_back({b, &candidates[b].list, {}});
      }
    }
    sparse_forward(p, reader, sparse);
    return dense;
  }

  void finish_dense(const Screen& screen, const std::vector<Candidates>& candidates) {
    const Tiles& tiles = screen.tiles;
    const int64_t size = static_cast<int64_t>(tiles.rows.size());
    Anchors anchors(tiles.padded());
    std::vector<double> anchor_s(size);
    bool any = false;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t b = tiles.rows[i];
      const Candidates& found = candidates[b];
      if (!found.too_many) continue;
      anchor_s[i] = exact_s(b, found.nearest);
      if (!certify(p, o, b, screen.bounds[b], anchor_s[i])) {
        uncertified[b] = 1;
        continue;
      }
      anchors.set(p, o, screen.bounds[b], i, b, anchor_s[i], cutoff_depth(p));
      p.anchor[b] = found.nearest;
      any = true;
    }
    if (!any) return;
    const SecondPass pass(screen, anchors);
    pass.weigh();
    std::vector<double> rest(size);  // weight of the references that are not heavy
    std::vector<std::vector<int32_t>> heavy(size);
    parallel_for(p.num_threads, size, [&](int64_t i, int) {
      if (takes_part(anchors, i)) rest[i] = take_heavy(pass, i, pass.total(i), heavy[i]);
    });
    const Buffer<double> sums(size * p.dim);
    pass.gather(sums.get());
    parallel_for(p.num_threads, size, [&](int64_t i, int) {
      if (takes_part(anchors, i)) {
        finish(tiles.rows[i], anchor_s[i], rest[i], heavy[i], sums.get() + i * p.dim);
      }
    });
  }

  static bool takes_part(const Anchors& anchors, int64_t i) { return anchors.cutoff[i] < 0; }

  double exact_s(int64_t b, int64_t j) const {
    const double* x = p.x + b * round_up(p.dim, kPad);
    const double offset = RadialKernel(p.half_k, p.t[b]).s_offset(p.t[b]);
    return pair_sums(reader, x, nullptr, j).distance + offset;
  }

  // Takes the heavy references out of the weights; returns the weight of the others.
  double take_heavy(const SecondPass& pass, int64_t i, double total,
                    std::vector<int32_t>& heavy) const {
    if (total * kHeavy > 2) return total;  // the anchor itself, of weight about 1, is not heavy
    const int64_t tile = i / kTileQueries, width = pass.tiles.width(tile);
    float* weights = pass.screen.tile_products(tile) + i % kTileQueries;
    double taken = 0;
    for (int64_t j = 0; j < p.count; ++j) {
      float& weight = weights[j * width];
      if (weight <= total * kHeavy) continue;
      heavy.push_back(static_cast<int32_t>(j));
      taken += weight;
      weight = 0;
    }
    return std::max(0.0, total - taken);
  }

  void finish(int64_t b, double anchor_s, double rest, const std::vector<int32_t>& heavy,
              const double* sums) const {
    const int64_t ld = round_up(p.dim, kPad);
    const RadialKernel kernel(p.half_k, p.t[b]);
    const double* x = p.x + b * ld;
    double* displacement = p.displacement + b * ld;
    std::fill(displacement, displacement + ld, 0.0);
    for (int64_t c = 0; c < p.dim; ++c) {
      displacement[c] = o.unit * sums[c] + rest * (o.origin[c] - x[c]);
    }
    double total = rest;
    for (const int32_t j : heavy) {
      const double weight = kernel.relative_weight(exact_s(b, j), anchor_s);
      total += weight;
      add_row(reader, x, j, weight, displacement);
    }
    for (int64_t c = 0; c < p.dim; ++c) displacement[c] /= total;
    p.log_mass[b] = kernel.logit(anchor_s) + ::log(total);
    p.anchor_log_weight[b] = -::log(total);
  }
};

}  // namespace

void PFGM_ISA::two_pass_forward(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles all;
  for (int64_t b = 0; b < p.batch; ++b) {
    const QueryNorms norms = query_norms(p, operands, b);
    // Also false for NaN: what is not finite, here or in a reference, goes to the exact kernel.
    const bool usable = norms.squared + norms.t_squared < 1e30 && operands.radius < 1e15;
    uncertified[b] = !usable;
    if (usable) all.rows.push_back(b);
  }
  const int64_t fit = p.workspace / 2 / (4 * p.count) / kTileQueries * kTileQueries;
  const int64_t most = std::max<int64_t>(kTileQueries, fit);
  for (size_t start = 0; start < all.rows.size(); start += most) {
    const auto first = all.rows.begin() + static_cast<int64_t>(start);
    const int64_t size = std::min<int64_t>(most, all.rows.end() - first);
    Forward{p, operands, RowReader(p), uncertified}.run(Tiles{{first, first + size}});
  }
}

}  // namespace pfgm
