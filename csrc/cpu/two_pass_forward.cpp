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

struct Forward {
  const FieldParams& p;
  const Operands& o;
  const RowReader reader{p};
  uint8_t* uncertified;

  // All queries of the tiles.
  void run(const Tiles& tiles) {
    Screen screen(p, o, tiles);
    std::vector<Candidates> candidates(p.batch);
    const int64_t few = few_candidates(p);
    const bool integers = screen_references(screen);
    select(screen, integers, nullptr, few, candidates);
    Tiles dense = finish_sparse(tiles, candidates);
    if (dense.rows.empty()) return;
    if (!integers && dense.rows.size() == tiles.rows.size())
      return finish_dense(screen, candidates);
    Screen rest(p, o, dense);
    compact(screen, rest);
    screen.products = Buffer<float>();
    for (const int64_t b : dense.rows) rest.bounds[b] = screen.bounds[b];
    if (integers) {
      refine(rest, candidates);
      select(rest, false, nullptr, few, candidates);
      finish_sparse(dense, candidates);
    }
    finish_dense(rest, candidates);
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
      if (!takes_part(anchors, i)) return;
      const int64_t b = tiles.rows[i];
      const double total = pass.total(i), off = pass.weight(i, p.anchor[b]) - 1;
      if (total * kHeavy > 1) uncertified[b] = !(std::abs(off) <= kAnchorTolerance);
      rest[i] = take_heavy(pass, i, total, heavy[i]);
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
    const double distance = ::sqrt(std::max(0.0, anchor_s - kernel.s_offset(p.t[b])));
    if (!resolves(p, o, displacement, distance)) uncertified[b] = 1;
    p.log_mass[b] = kernel.logit(anchor_s) + ::log(total);
    p.anchor_log_weight[b] = -::log(total);
  }
};

}  // namespace

void PFGM_ISA::two_pass_forward(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles usable;
  for (int64_t b = 0; b < p.batch; ++b) {
    uncertified[b] = !in_range(p, operands, b);
    if (!uncertified[b]) usable.rows.push_back(b);
  }
  if (!usable.rows.empty()) Forward{p, operands, RowReader(p), uncertified}.run(usable);
}

}  // namespace pfgm
