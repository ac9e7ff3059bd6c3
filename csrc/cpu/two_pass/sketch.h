// SPDX-License-Identifier: Apache-2.0
// Before the first pass: products of few columns, for queries that are near the data.
//
// With P the rows of an orthonormal basis and Q what these leave of the space, x' and the y_j are
// a part in P and one in Q each, and
//
//   |x'·y_j − P x'·P y_j| ≤ ‖Q x'‖ ‖Q y_j‖
//
// so that products of P's few columns bound r_j (screen.h) from below. Where the data lie near the
// space of P, and the query is not far, that leaves so few references that they are finished by
// direct differences at once; any other query goes on to more columns, or to the first pass.
//
// Coordinates are 16-bit integers whose norms are at most kShortNorm, so that no sum of products
// overflows 32 bits. A pair costs one multiply-add for two columns and a handful of instructions;
// bounds are compared where they are formed, none is kept.
#pragma once

#include <atomic>
#include <numeric>
#include <utility>

#include "screen_products.h"

namespace pfgm {
namespace {

constexpr double kBasisError = 1e-11;  // of P P' = 1, and of coordinates beside ‖y‖
constexpr double kShortNorm = 32000;   // _sketch.NORM
constexpr int64_t kSketchRows = 1024;  // references of a task
constexpr int64_t kLikely = 4;  // references whose distance is taken, the least of which counts
constexpr int64_t kSketchBlock = 48;     // of which products lie in the first cache
constexpr double kFloatBound = 0x1p-21;  // of what is added up; a fortieth of what 16 bits leave
constexpr int64_t kWorthVectors = 2;     // of queries, which the first pass has to be spared

// Direct differences that take as long as the first pass of a vector of queries, and how many of
// them a query may have.
inline int64_t pairs_of_vector(const FieldParams& p) {
  return std::max<int64_t>(512, p.count / 40);
}
inline int64_t most_of_sketch(const FieldParams& p) { return pairs_of_vector(p) / 2; }

// Products of the queries of tiles with sketched references.
struct SketchScreen {
  const FieldParams& p;
  const Operands& o;
  const Sketch& sketch;
  const Tiles& tiles;
  int64_t steps = sketch.dim / 2;
  int64_t num_tasks = (p.count + kSketchRows - 1) / kSketchRows;
  std::vector<Bound> bounds{static_cast<size_t>(p.batch)};  // indexed by the rows of the batch
  // r ≥ ‖y_j‖² − factor · product − slope · ‖Q y_j‖ − constant, in float but for the constant.
  Buffer<float> factors{tiles.padded()}, slopes{tiles.padded()};
  Buffer<int32_t> packed{tiles.padded() * steps};

  SketchScreen(const FieldParams& p, const Operands& o, const Sketch& sketch, const Tiles& tiles)
      : p(p), o(o), sketch(sketch), tiles(tiles) {
    parallel_for(p.num_threads, tiles.padded() / kFloatLanes,
                 [&](int64_t task, int) { pack(task * kFloatLanes); });
  }

  int64_t size() const { return static_cast<int64_t>(tiles.rows.size()); }

  // Coordinates of kFloatLanes queries, counted over all tiles, and their bounds.
  void pack(int64_t start) {
    const Buffer<double> x(p.dim * kFloatLanes), points(sketch.dim * kFloatLanes);
    for (int64_t q = 0; q < kFloatLanes; ++q) {
      for (int64_t c = 0; c < p.dim; ++c) {
        x[c * kFloatLanes + q] = start + q < size() ? shifted(p, o, tiles.rows[start + q], c) : 0;
      }
    }
    product<DoubleProduct>(sketch.basis, sketch.dim, p.dim, 1, x.get(), kFloatLanes, p.dim,
                           points.get(), false);
    const int64_t tile = start / kTileQueries, width = tiles.width(tile);
    int32_t* to = packed.get() + tile * kTileQueries * steps + start % kTileQueries;
    for (int64_t q = 0; q < kFloatLanes; ++q) {
      double inside = 0, residual = 0;
      for (int64_t c = 0; c < sketch.dim; ++c) {
        inside += points[c * kFloatLanes + q] * points[c * kFloatLanes + q];
      }
      const double unit = std::max(::sqrt(inside), 1e-280) / kShortNorm;
      for (int64_t k = 0; k < steps; ++k) {
        int16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const double exact = points[(2 * k + i) * kFloatLanes + q];
          pair[i] = static_cast<int16_t>(std::lrint(exact / unit));
          residual += (exact - unit * pair[i]) * (exact - unit * pair[i]);
        }
        __builtin_memcpy(to + k * width + q, pair, sizeof pair);
      }
      factors[start + q] = slopes[start + q] = 0;
      if (start + q >= size()) continue;
      const Bound bound = make_bound(tiles.rows[start + q], inside, ::sqrt(residual), unit);
      factors[start + q] = static_cast<float>(bound.factor);
      slopes[start + q] = static_cast<float>(bound.slope);
      bounds[tiles.rows[start + q]] = bound;
    }
  }

  // inside: ‖P x'‖²; residual: the norm of what integers leave of P x'.
  Bound make_bound(int64_t b, double inside, double residual, double unit) const {
    const double squared = query_norms(p, o, b).squared, norm = ::sqrt(squared);
    const double deviation = o.codes ? o.deviation : kFloatRounding * o.radius;
    const double rounding = kFloatBound * o.radius * (o.radius + 4 * norm);
    Bound bound{};
    bound.factor = 2 * unit * sketch.unit;
    bound.slope = 2 * ::sqrt(std::max(0.0, squared - inside) + kBasisError * squared);
    bound.squared = bound.offset = squared;
    bound.constant = 2 * residual * (o.radius + sketch.residual) + 2 * norm * sketch.residual +
                     2 * kBasisError * o.radius * norm + rounding +
                     2 * deviation * (o.radius + norm + deviation) + 0x1p-48 * squared;
    return bound;
  }

  // visit(task, i, j, rows, sums): the products of references j to j + rows with kFloatLanes
  // queries from i on, counted over all tiles; rows of sums are width(tile) apart.
  template <class Visit>
  void for_products(const Visit& visit) const {
    parallel_for(p.num_threads, num_tasks, [&](int64_t task, int) {
      alignas(64) int32_t sums[kSketchBlock * kTileQueries];
      const int64_t end = std::min(p.count, (task + 1) * kSketchRows);
      for (int64_t first = task * kSketchRows; first < end; first += kSketchBlock) {
        const int64_t rows = std::min(end - first, kSketchBlock);
        const auto* points = reinterpret_cast<const int32_t*>(sketch.points) + first * steps;
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          product<ShortProduct>(points, rows, steps, 1, packed.get() + tile * kTileQueries * steps,
                                tiles.width(tile), steps, sums, false);
          for (int64_t q = 0; q < tiles.width(tile); q += kFloatLanes) {
            visit(task, tile * kTileQueries + q, first, rows, sums + q);
          }
        }
      }
    });
  }

  // What r is at least, for kFloatLanes queries, but for their constants.
  struct Lanes {
    const SketchScreen& screen;
    VecF factor, slope;
    int64_t width;

    Lanes(const SketchScreen& screen, int64_t i)
        : screen(screen),
          factor(load(&screen.factors[i])),
          slope(load(&screen.slopes[i])),
          width(screen.tiles.width(i / kTileQueries)) {}

    VecF least(int64_t j, const int32_t* sums) const {
      const VecF product = __builtin_convertvector(load(sums), VecF);
      return (static_cast<float>(screen.o.norms[j]) - slope * screen.sketch.rest[j]) -
             factor * product;
    }
  };

  // For each query, counted over all tiles, kLikely references that seem to be the nearest.
  std::vector<int32_t> likely_nearest() const {
    const int64_t padded = tiles.padded();
    const Buffer<float> smallest(num_tasks * padded);
    const Buffer<int32_t> places(num_tasks * padded);
    std::fill_n(smallest.get(), num_tasks * padded, INFINITY);
    std::fill_n(places.get(), num_tasks * padded, 0);
    for_products([&](int64_t task, int64_t i, int64_t first, int64_t rows, const int32_t* sums) {
      const Lanes lanes(*this, i);
      float* low = smallest.get() + task * padded + i;
      int32_t* at = places.get() + task * padded + i;
      VecF nearest = load(low);
      VecFInt place = load(at);
      for (int64_t n = 0; n < rows; ++n) {
        const VecF r = lanes.least(first + n, sums + n * lanes.width);
        const VecFInt nearer = r < nearest;
        nearest = nearer ? r : nearest;
        place = nearer ? VecFInt{} + static_cast<int32_t>(first + n) : place;
      }
      store(low, nearest);
      __builtin_memcpy(at, &place, sizeof place);
    });
    std::vector<int32_t> found;
    std::vector<int64_t> tasks(num_tasks);
    for (int64_t i = 0; i < size(); ++i) {
      const auto nearer = [&](int64_t a, int64_t b) {
        return smallest[a * padded + i] < smallest[b * padded + i];
      };
      std::iota(tasks.begin(), tasks.end(), 0);
      const auto end = tasks.begin() + std::min<int64_t>(kLikely, num_tasks);
      std::partial_sort(tasks.begin(), end, tasks.end(), nearer);
      for (int64_t n = 0; n < kLikely; ++n) {
        found.push_back(places[tasks[std::min(n, num_tasks - 1)] * padded + i]);
      }
    }
    return found;
  }

  // Lists the references whose r may be within largest(b) of queries that have no more than
  // most_of_sketch.
  template <class Largest>
  void select(const Largest& largest, std::vector<Candidates>& candidates) const {
    const int64_t most = most_of_sketch(p), padded = tiles.padded();
    const Buffer<float> limits(padded);
    for (int64_t i = 0; i < padded; ++i) {
      limits[i] = -INFINITY;
      if (i >= size()) continue;
      const int64_t b = tiles.rows[i];
      const auto limit = static_cast<float>(largest(b) + bounds[b].constant);
      limits[i] = std::nextafter(limit, INFINITY);
    }
    const Buffer<int32_t> counts(num_tasks * padded);
    std::fill_n(counts.get(), num_tasks * padded, 0);
    std::vector<std::atomic<int64_t>> listed(padded);
    std::vector<std::vector<std::pair<int32_t, int32_t>>> hits(num_tasks);
    for_products([&](int64_t task, int64_t i, int64_t first, int64_t rows, const int32_t* sums) {
      const Lanes lanes(*this, i);
      const VecF limit = load(&limits[i]);
      unsigned open = 0;  // lists that are too long are of no use
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        open |= unsigned{listed[i + lane].load(std::memory_order_relaxed) <= most} << lane;
      }
      int32_t* to = counts.get() + task * padded + i;
      VecFInt count = load(to);
      for (int64_t n = 0; n < rows; ++n) {
        const VecFInt near = lanes.least(first + n, sums + n * lanes.width) <= limit;
        count -= near;
        for (unsigned mask = bits(near) & open; mask; mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          listed[i + lane].fetch_add(1, std::memory_order_relaxed);
          hits[task].emplace_back(static_cast<int32_t>(i) + lane, static_cast<int32_t>(first + n));
        }
      }
      __builtin_memcpy(to, &count, sizeof count);
    });
    for (int64_t i = 0; i < size(); ++i) {
      const int64_t b = tiles.rows[i];
      int64_t count = 0;
      for (int64_t task = 0; task < num_tasks; ++task) count += counts[task * padded + i];
      candidates[b] = Candidates();
      candidates[b].too_many = count > most;
    }
    for (const auto& of_task : hits) {
      for (const auto& [i, j] : of_task) {
        Candidates& found = candidates[tiles.rows[i]];
        if (!found.too_many) found.list.push_back(j);
      }
    }
  }
};

// The queries that sketches may spare the first pass, if that is worth it; the others are put
// aside.
inline Tiles near_data(const SketchScreen& screen, Tiles& others) {
  const Tiles& tiles = screen.tiles;
  Tiles near;
  for (const int64_t b : tiles.rows) {
    const bool is_near = screen.bounds[b].slope <= 2 * screen.sketch.reach;
    (is_near ? near : others).rows.push_back(b);
  }
  if (others.padded() == 0) return near;
  // A first pass takes as long as the references take to read.
  const int64_t least = std::max(others.padded() / kFloatLanes, kWorthVectors);
  if (tiles.padded() / kFloatLanes - least >= kWorthVectors) return near;
  others = tiles;
  return {};
}

// Of queries with lists, finished are those with a few references each, and as many more as spare
// what follows something: after the last columns the first pass, which so many others need anyway,
// a whole vector; before, the next columns all. The rest has too many.
inline void choose_sparse(const FieldParams& p, const Tiles& tiles, bool last, int64_t others,
                          std::vector<Candidates>& candidates) {
  std::vector<int64_t> rows;
  for (const int64_t b : tiles.rows) {
    if (!candidates[b].too_many) rows.push_back(b);
  }
  const auto pairs = [&](int64_t b) { return static_cast<int64_t>(candidates[b].list.size()); };
  std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) {
    return std::make_pair(pairs(a), a) < std::make_pair(pairs(b), b);
  });
  auto next = rows.begin();
  while (next != rows.end() && pairs(*next) * kFloatLanes <= pairs_of_vector(p)) ++next;
  const int64_t full = static_cast<int64_t>(tiles.rows.size() - rows.size());
  while (next != rows.end()) {
    const int64_t all = full + (rows.end() - next);
    const int64_t beyond = last ? (all + others - 1) % kFloatLanes + 1 : all;
    if (beyond > rows.end() - next) break;
    int64_t total = 0;
    for (auto b = next; b != next + beyond; ++b) total += pairs(*b);
    if (total > pairs_of_vector(p)) break;
    next += beyond;
  }
  for (; next != rows.end(); ++next) candidates[*next].too_many = true;
}

}  // namespace
}  // namespace pfgm
