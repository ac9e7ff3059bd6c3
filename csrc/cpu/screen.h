// SPDX-License-Identifier: Apache-2.0
// The first pass of the kernels for larger d: products x'·y_j of all queries with all references,
// and from rigorous bounds of their errors the references that may carry weight.
//
//   r_j = ‖y_j‖² − 2 x'·y_j,   ‖x − x0_j‖² / unit² = r_j + ‖x'‖²
//
// A reference whose r_j is certainly larger than what the cutoff allows cannot be seen in the
// result.
#pragma once

#include "queries.h"

namespace pfgm {
namespace {

constexpr int64_t kScreenRows = 96;  // references in a block

// A query's r_j = norm_j − factor · product_j, off by at most slope · ‖y_j‖ + constant.
struct Bound {
  double factor, slope, constant;
  double squared, residual;  // ‖x'‖², and ‖x' − what was multiplied‖
  double roundings;          // how often the sum of a product was rounded to float
  double offset;             // squared distance / unit² − r
};

inline Bound make_bound(const FieldParams& p, const Operands& o, QueryNorms query, double factor,
                        double residual, double roundings) {
  const double x_norm = ::sqrt(query.squared);
  const double rounding = roundings * kFloatRounding * x_norm;
  const double deviation = o.codes ? o.deviation : kFloatRounding * o.radius;
  const double underflow = roundings > 0 ? 1e-37 * static_cast<double>(p.dim) : 0;
  Bound bound;
  bound.factor = factor;
  bound.squared = query.squared;
  bound.residual = residual;
  bound.roundings = roundings;
  bound.slope = 2 * (rounding + residual + deviation);
  bound.constant = 2 * (x_norm * deviation + underflow) + 0x1p-48 * query.squared;
  bound.offset = query.squared;
  return bound;
}

// Products of a tile, (N, width) int32 or float, and per block of references the smallest that r
// can be and the smallest that it must be, (blocks, width) each.
struct Screen {
  const FieldParams& p;
  const Operands& o;
  const Tiles& tiles;
  std::vector<Bound> bounds;  // (B,), indexed by the rows of the batch
  const double* norms;        // (N,) ‖y_j‖², or zeros where the products hold r itself
  bool integers = false;      // whether the products are int32
  Buffer<float> products;
  Buffer<double> least, most;
  std::vector<double> zeros;  // (N,), where they are needed

  Screen(const FieldParams& p, const Operands& o, const Tiles& tiles)
      : p(p),
        o(o),
        tiles(tiles),
        bounds(p.batch),
        norms(o.norms),
        products(p.count * tiles.padded()),
        least(num_blocks() * tiles.padded()),
        most(num_blocks() * tiles.padded()) {}

  int64_t num_blocks() const { return (p.count + kScreenRows - 1) / kScreenRows; }
  float* tile_products(int64_t tile) const {
    return products.get() + tile * kTileQueries * p.count;
  }
  // Of query i, counted over all tiles, and reference j.
  float& product(int64_t i, int64_t j) const {
    const int64_t tile = i / kTileQueries;
    return tile_products(tile)[j * tiles.width(tile) + i % kTileQueries];
  }
  int64_t minima(int64_t tile, int64_t block) const {
    return tile * kTileQueries * num_blocks() + block * tiles.width(tile);
  }

  // Bounds r over the references of a block; Element is the type of the products.
  template <class Element>
  void bound_block(int64_t tile, int64_t block) const {
    const int64_t first = block * kScreenRows, width = tiles.width(tile);
    const int64_t last = std::min(p.count, first + kScreenRows);
    const Element* sums = reinterpret_cast<const Element*>(tile_products(tile));
    for (int64_t q = 0; q < width; q += kLanes) {
      const Lanes lanes(*this, tile, q);
      Vec low = broadcast(double{INFINITY}), high = low;
      for (int64_t j = first; j < last; ++j) {
        const Vec r = norms[j] - lanes.factor * widen(sums + j * width + q);
        const Vec error = lanes.slope * o.roots[j];
        low = r - error < low ? r - error : low;
        high = r + error < high ? r + error : high;
      }
      store(least.get() + minima(tile, block) + q, low - lanes.constant);
      store(most.get() + minima(tile, block) + q, high + lanes.constant);
    }
  }

  // Bounds of kLanes neighbouring queries; what is beside the batch has none.
  struct Lanes {
    Vec factor = {}, slope = {}, constant = {};

    Lanes(const Screen& screen, int64_t tile, int64_t q) {
      for (int i = 0; i < kLanes && q + i < screen.tiles.size(tile); ++i) {
        const Bound& bound = screen.bounds[screen.tiles.row(tile, static_cast<int>(q) + i)];
        factor[i] = bound.factor;
        slope[i] = bound.slope;
        constant[i] = bound.constant;
      }
    }
  };
};

// The references that may carry weight for a query, as far as they were listed.
struct Candidates {
  std::vector<int32_t> list;
  double smallest = 0;  // no r of the query is certain to be smaller
  bool too_many = false;
  int64_t nearest = 0;  // the reference whose r is the smallest
};

// The r of a reference that is `depth` below one at this squared distance, in logits.
inline double farthest_r(const FieldParams& p, const Operands& o, int64_t b, double offset,
                         double nearest, double depth) {
  const RadialKernel kernel(p.half_k, p.t[b]);
  return kernel.farthest(nearest, depth) / (o.unit * o.unit) - offset;
}

// Largest r that counts beside the nearest reference.
inline double cutoff(const FieldParams& p, const Operands& o, int64_t b, double offset,
                     double smallest) {
  const double nearest = (smallest + offset) * o.unit * o.unit;
  return farthest_r(p, o, b, offset, nearest, cutoff_depth(p));
}

// The smallest r that lanes q to q + kLanes of a tile are certain to have.
inline Vec smallest_r(const Screen& screen, int64_t tile, int64_t q) {
  Vec smallest = broadcast(double{INFINITY});
  for (int64_t block = 0; block < screen.num_blocks(); ++block) {
    const Vec high = load(screen.most.get() + screen.minima(tile, block) + q);
    smallest = high < smallest ? high : smallest;
  }
  return smallest;
}

// Candidates up to which a query is finished by direct differences: a pair then costs more, but
// there are fewer of them.
inline int64_t few_candidates(const FieldParams& p) { return std::max<int64_t>(64, p.count / 16); }

// Candidates of a query that are listed, and of the queries that spare a vector in the second pass.
inline int64_t most_listed(const FieldParams& p) {
  return std::max(few_candidates(p), p.count / 4);
}

// The second pass over a vector of queries costs about as much as direct differences of one query
// to all references: the queries beyond whole vectors are spared it where they have few candidates
// in all.
inline void fill_vectors(const FieldParams& p, const std::vector<int64_t>& rows,
                         std::vector<Candidates>& candidates) {
  std::vector<Candidates*> dense;
  for (const int64_t b : rows) {
    if (candidates[b].too_many) dense.push_back(&candidates[b]);
  }
  const auto end = dense.begin() + dense.size() % kFloatLanes;
  std::partial_sort(dense.begin(), end, dense.end(), [](const Candidates* a, const Candidates* b) {
    return a->list.size() < b->list.size();
  });
  size_t total = 0;
  for (auto i = dense.begin(); i < end; ++i) total += (*i)->list.size();
  if (static_cast<int64_t>(total) > most_listed(p)) return;
  for (auto i = dense.begin(); i < end; ++i) (*i)->too_many = false;
}

// Lists the candidates of the queries of the tiles, up to one more than most_listed. largest(b,
// smallest): the largest r that counts.
template <class Element, class Largest>
void select_as(const Screen& screen, const Largest& largest, std::vector<Candidates>& candidates) {
  const FieldParams& p = screen.p;
  const int64_t few = few_candidates(p), most = most_listed(p);
  const int64_t groups = kTileQueries / kLanes, num_blocks = screen.num_blocks();
  parallel_for(p.num_threads, screen.tiles.count() * groups, [&](int64_t task, int) {
    const int64_t tile = task / groups, q = task % groups * kLanes;
    const int64_t width = screen.tiles.width(tile);
    const int count = screen.tiles.size(tile) - static_cast<int>(q);
    if (count <= 0) return;
    const Screen::Lanes lanes(screen, tile, q);
    const Vec smallest = smallest_r(screen, tile, q);
    Vec limit = broadcast(-double{INFINITY});
    for (int i = 0; i < kLanes && i < count; ++i) {
      limit[i] = largest(screen.tiles.row(tile, static_cast<int>(q) + i), smallest[i]);
    }
    const Element* sums = reinterpret_cast<const Element*>(screen.tile_products(tile));
    Vec nearest_r = broadcast(double{INFINITY}), nearest = {};
    unsigned listing = (1u << kLanes) - 1;  // lanes whose lists are not full
    for (int64_t block = 0; block < num_blocks; ++block) {
      const Vec low = load(screen.least.get() + screen.minima(tile, block) + q);
      if (!(bits(low <= limit) & listing) && !bits(low <= smallest)) continue;
      const int64_t last = std::min(p.count, (block + 1) * kScreenRows);
      for (int64_t j = block * kScreenRows; j < last; ++j) {
        const Vec r = screen.norms[j] - lanes.factor * widen(sums + j * width + q);
        const VecInt nearer = r < nearest_r;
        nearest_r = nearer ? r : nearest_r;
        nearest = nearer ? broadcast(static_cast<double>(j)) : nearest;
        const Vec least = r - lanes.slope * screen.o.roots[j] - lanes.constant;
        for (unsigned mask = bits(least <= limit) & listing; mask; mask &= mask - 1) {
          const int i = __builtin_ctz(mask);
          Candidates& found = candidates[screen.tiles.row(tile, static_cast<int>(q) + i)];
          found.list.push_back(static_cast<int32_t>(j));
          if (static_cast<int64_t>(found.list.size()) > most) listing &= ~(1u << i);
        }
      }
    }
    for (int i = 0; i < kLanes && i < count; ++i) {
      Candidates& found = candidates[screen.tiles.row(tile, static_cast<int>(q) + i)];
      found.nearest = static_cast<int64_t>(nearest[i]);
      found.smallest = smallest[i];
      found.too_many = static_cast<int64_t>(found.list.size()) > few;
    }
  });
}

template <class Largest>
void select(const Screen& screen, const Largest& largest, std::vector<Candidates>& candidates) {
  for (const int64_t b : screen.tiles.rows) candidates[b] = Candidates();
  screen.integers ? select_as<int32_t>(screen, largest, candidates)
                  : select_as<float>(screen, largest, candidates);
}

// Whether float holds the squares of everything. False for NaN, so that what is not finite, in a
// query or in any reference, goes to the exact kernel.
inline bool in_range(const FieldParams& p, const Operands& o, int64_t b) {
  const QueryNorms norms = query_norms(p, o, b);
  return norms.squared + norms.t_squared < 1e30 && o.radius < 1e15;
}

}  // namespace
}  // namespace pfgm
