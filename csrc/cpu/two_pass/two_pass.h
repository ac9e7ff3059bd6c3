// SPDX-License-Identifier: Apache-2.0
// The order of the two passes for larger d and float32 queries, the same for the field and for its
// gradients:
//
//   0. products of a few columns spare most queries near the data all that follows (sketch.h);
//   1. products of queries and references bound every s_j (screen.h); queries that few references
//      can carry weight for are finished by direct differences in double (sparse.h). Products of
//      8-bit integers are refined for the other queries, and these are screened again;
//   2. the rest are finished with weights of all references, relative to an anchor (dense.h), once
//      direct differences have replaced the products that are not precise enough (differences.h).
#pragma once

#include <optional>

#include "differences.h"
#include "sketch.h"

namespace pfgm {
namespace {

struct TwoPass {
  const FieldParams& p;
  uint8_t* uncertified;  // (B,)
  Operands o = make_operands(p);
  RowReader reader{p};

  TwoPass(const FieldParams& p, uint8_t* uncertified) : p(p), uncertified(uncertified) {}

  // Whether these passes can compute a query at all.
  virtual bool usable(int64_t b) const { return in_range(p, o, b); }
  // The largest r that counts, no r being certain to be smaller than `smallest`.
  virtual double limit(const Bound& bound, int64_t b, double smallest) const = 0;
  // Finishes queries by the references on their lists.
  virtual void finish_sparse(std::vector<SparseQuery>& queries) const = 0;

  // Whether limits depend on the smallest r.
  virtual bool limited_by_smallest() const { return true; }
  // Whether these references may be without any that counts.
  virtual bool may_have_none() const { return false; }

  // The squared distance of the anchor, exactly; `nearest` is the reference with the smallest r.
  virtual double anchor_square(int64_t b, int64_t nearest) const = 0;
  // How far below the anchor's logit those lie that count.
  virtual double depth(int64_t) const { return cutoff_depth(p); }
  // Whether float sums resolve what the distances weigh where the anchor is at this squared one.
  virtual bool resolved(int64_t, int64_t, double) const { return true; }
  // Finishes the queries that take part in a second pass, or marks them as uncertified.
  virtual void finish_dense(const SecondPass& pass) const = 0;

  // All queries of the batch.
  void run() const {
    Tiles tiles;
    for (int64_t b = 0; b < p.batch; ++b) {
      uncertified[b] = !usable(b);
      if (!uncertified[b]) tiles.rows.push_back(b);
    }
    std::vector<Candidates> candidates(p.batch);
    tiles = sketch_passes(tiles, candidates);
    if (tiles.rows.empty()) return;
    Screen screen(p, o, tiles);
    screen_references(screen);
    const Tiles dense = first_pass(screen, candidates, true);
    if (dense.rows.empty()) return;
    Screen rest(p, o, dense);
    compact(screen, rest);
    if (refine(rest, candidates)) first_pass(rest, candidates, false);
    second_pass(rest, candidates);
  }

  // Finishes the queries for which sketches leave few candidates and returns the others.
  Tiles sketch_passes(const Tiles& tiles, std::vector<Candidates>& candidates) const {
    if (!p.sketches[0].points || tiles.rows.empty()) return tiles;
    std::optional<SketchScreen> screen(std::in_place, p, o, p.sketches[0], tiles);
    Tiles others, rest = near_data(*screen, others);
    std::vector<double> squares(p.batch);
    for (const Sketch* sketch = p.sketches; sketch != p.sketches + kSketches; ++sketch) {
      if (!sketch->points || rest.rows.empty()) break;
      const bool first = sketch == p.sketches;
      if (!first || !others.rows.empty()) screen.emplace(p, o, *sketch, rest);
      if (limited_by_smallest() && first) near_squares(*screen, squares);
      screen->select(
          [&](int64_t b) {
            const double offset = screen->bounds[b].offset;
            const double square = squares[b] * o.inverse_unit * o.inverse_unit * (1 + 0x1p-40);
            return limit(screen->bounds[b], b, square - offset);
          },
          candidates);
      const bool last = sketch + 1 == p.sketches + kSketches || !sketch[1].points;
      choose_sparse(p, rest, last, static_cast<int64_t>(others.rows.size()), candidates);
      rest = finish_few(rest, candidates);
    }
    rest.rows.insert(rest.rows.end(), others.rows.begin(), others.rows.end());
    std::sort(rest.rows.begin(), rest.rows.end());
    return rest;
  }

  // The squared distance of a reference near each query, if not of the nearest.
  void near_squares(const SketchScreen& screen, std::vector<double>& squares) const {
    const std::vector<int32_t> likely = screen.likely_nearest();
    parallel_for(p.num_threads, screen.size(), [&](int64_t i, int) {
      const int64_t b = screen.tiles.rows[i];
      const double* x = p.x + b * round_up(p.dim, kPad);
      squares[b] = INFINITY;
      for (int64_t n = i * kLikely; n < (i + 1) * kLikely; ++n) {
        squares[b] = std::min(squares[b], pair_sums(reader, x, nullptr, likely[n]).distance);
      }
    });
  }

  // Finishes the queries with few candidates and returns the others. fills_vectors: these will be
  // packed anew.
  Tiles first_pass(const Screen& screen, std::vector<Candidates>& candidates,
                   bool fills_vectors) const {
    const auto largest = [&](int64_t b, double smallest) {
      return limit(screen.bounds[b], b, smallest);
    };
    select(screen, largest, candidates);
    if (fills_vectors) fill_vectors(screen, largest, candidates);
    return finish_few(screen.tiles, candidates);
  }

  Tiles finish_few(const Tiles& tiles, const std::vector<Candidates>& candidates) const {
    Tiles dense;
    std::vector<SparseQuery> sparse;
    for (const int64_t b : tiles.rows) {
      if (candidates[b].too_many) {
        dense.rows.push_back(b);
      } else if (candidates[b].list.empty() && !may_have_none()) {
        uncertified[b] = 1;
      } else {
        sparse.push_back({b, &candidates[b].list, {}});
      }
    }
    finish_sparse(sparse);
    return dense;
  }

  // Finishes the queries with too many candidates.
  void second_pass(const Screen& screen, const std::vector<Candidates>& candidates) const {
    const Tiles& tiles = screen.tiles;
    Anchors anchors(tiles.padded());
    std::vector<int64_t> coarse;
    bool any = false;
    for (size_t i = 0; i < tiles.rows.size(); ++i) {
      const int64_t b = tiles.rows[i];
      if (!candidates[b].too_many) continue;
      const double square = anchor_square(b, candidates[b].nearest);
      uncertified[b] = !resolved(b, candidates[b].nearest, square);
      if (uncertified[b]) continue;
      if (!certify(screen, b, candidates[b].nearest, square)) coarse.push_back(i);
      anchors.set(screen, i, square, depth(b));
      any = true;
    }
    while (!coarse.empty()) coarse = subtract_from_nearest(screen, anchors, coarse);
    if (any) finish_dense(SecondPass(screen, anchors));
  }

  // Puts direct differences in the place of products. Returns the queries for which it is to be
  // done again: beside references so far off as an anchor that coarse products have chosen, float
  // does not resolve what is much nearer.
  std::vector<int64_t> subtract_from_nearest(const Screen& screen, Anchors& anchors,
                                             const std::vector<int64_t>& indices) const {
    const std::vector<int64_t> nearest = subtract(screen, anchors, indices);
    std::vector<int64_t> again;
    for (size_t n = 0; n < indices.size(); ++n) {
      const int64_t i = indices[n], b = screen.tiles.rows[i];
      const RadialKernel kernel(p.half_k, p.t[b]);
      const double before = anchors.squares[i], square = anchor_square(b, nearest[n]);
      anchors.set(screen, i, square, depth(b));
      anchors.r[i] = (square - before) * o.inverse_unit * o.inverse_unit;
      if (kernel.relative_logit<ScalarMath>(square, before) > 1) again.push_back(i);
    }
    return again;
  }
};

}  // namespace
}  // namespace pfgm
