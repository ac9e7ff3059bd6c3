// SPDX-License-Identifier: Apache-2.0
// The first pass of the kernels for larger d: products x'·y_j of all queries with all references,
// and from rigorous bounds of their errors the references that may carry weight.
//
//   r_j = ‖y_j‖² − 2 x'·y_j,   ‖x − x0_j‖² / unit² = r_j + ‖x'‖²
//
// A reference whose r_j is certainly larger than what the cutoff allows cannot be seen in the
// result.
#pragma once

#include "../common/bounds.h"
#include "../common/shares.h"

namespace pfgm {
namespace {

constexpr int64_t kScreenRows = 96;  // references in a block, at most

// Products of a tile, (N, width) int32 or float, and per block of references the smallest that r
// can be and the smallest that it must be, (blocks, width) each.
struct Screen {
  const FieldParams& p;
  const Operands& o;
  const Tiles& tiles;
  int64_t block_rows = even_block(p.num_threads, p.count, kScreenRows);
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

  int64_t num_blocks() const { return (p.count + block_rows - 1) / block_rows; }
  float* tile_products(int64_t tile) const {
    return products.get() + tile * kTileQueries * p.count;
  }
  // Of query i, counted over all tiles, and reference j.
  float& product(int64_t i, int64_t j) const {
    const int64_t tile = i / kTileQueries;
    return tile_products(tile)[j * tiles.width(tile) + i % kTileQueries];
  }
  // Of the same, as the product has it.
  double r(int64_t i, int64_t j) const {
    const float& sum = product(i, j);
    const double value = integers ? reinterpret_cast<const int32_t&>(sum) : double{sum};
    return norms[j] - bounds[tiles.rows[i]].factor * value;
  }
  int64_t minima(int64_t tile, int64_t block) const {
    return tile * kTileQueries * num_blocks() + block * tiles.width(tile);
  }

  // Bounds r over the references of a block; Element is the type of the products.
  template <class Element>
  void bound_block(int64_t tile, int64_t block) const {
    const int64_t first = block * block_rows, width = tiles.width(tile);
    const int64_t last = std::min(p.count, first + block_rows);
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
  int64_t listed = 0;   // the list is complete for the references before this one
  double smallest = 0;  // no r of the query is certain to be smaller
  bool too_many = false;
  int64_t nearest = 0;  // the reference whose r is the smallest
  double nearest_r = INFINITY;

  // Goes on with what was found among the references behind these.
  void append(Candidates& next, int64_t few) {
    if (next.nearest_r < nearest_r) {
      nearest_r = next.nearest_r;
      nearest = next.nearest;
    }
    if (too_many) return;
    if (list.empty()) {
      list.swap(next.list);
    } else {
      list.insert(list.end(), next.list.begin(), next.list.end());
    }
    too_many = static_cast<int64_t>(list.size()) > few;
    if (!too_many) return;
    list.resize(few + 1);
    listed = list.back() + 1;
  }
};

// The smallest r that lanes q to q + kLanes of a tile are certain to have.
inline Vec smallest_r(const Screen& screen, int64_t tile, int64_t q) {
  Vec smallest = broadcast(double{INFINITY});
  for (int64_t block = 0; block < screen.num_blocks(); ++block) {
    const Vec high = load(screen.most.get() + screen.minima(tile, block) + q);
    smallest = high < smallest ? high : smallest;
  }
  return smallest;
}

// Lists the candidates of kLanes neighbouring queries, (kLanes,), up to one more than
// few_candidates.
template <class Element>
struct Selection {
  const Screen& screen;
  Candidates* candidates;
  int64_t tile, q;
  int count;  // queries among the lanes
  Screen::Lanes lanes;
  Vec smallest, limit = broadcast(-double{INFINITY});
  Vec nearest_r = broadcast(double{INFINITY}), nearest = {};
  unsigned listing = (1u << kLanes) - 1;  // lanes whose lists are not full

  // largest(b, smallest): the largest r that counts.
  template <class Largest>
  Selection(const Screen& screen, const Largest& largest, Candidates* candidates, int64_t tile,
            int64_t q)
      : screen(screen),
        candidates(candidates),
        tile(tile),
        q(q),
        count(clamp_size(screen.tiles.size(tile) - q, kLanes)),
        lanes(screen, tile, q),
        smallest(smallest_r(screen, tile, q)) {
    for (int i = 0; i < count; ++i) limit[i] = largest(row(i), smallest[i]);
  }

  int64_t row(int lane) const { return screen.tiles.row(tile, static_cast<int>(q) + lane); }

  void scan(int64_t block, int64_t few) {
    const Vec low = load(screen.least.get() + screen.minima(tile, block) + q);
    if (!(bits(low <= limit) & listing) && !bits(low <= smallest)) return;
    const int64_t width = screen.tiles.width(tile);
    const int64_t last = std::min(screen.p.count, (block + 1) * screen.block_rows);
    const Element* sums = reinterpret_cast<const Element*>(screen.tile_products(tile)) + q;
    for (int64_t j = block * screen.block_rows; j < last; ++j) {
      const Vec r = screen.norms[j] - lanes.factor * widen(sums + j * width);
      const VecInt nearer = r < nearest_r;
      nearest_r = nearer ? r : nearest_r;
      nearest = nearer ? broadcast(static_cast<double>(j)) : nearest;
      const Vec least = r - lanes.slope * screen.o.roots[j] - lanes.constant;
      for (unsigned mask = bits(least <= limit) & listing; mask; mask &= mask - 1) {
        const int i = __builtin_ctz(mask);
        Candidates& found = candidates[i];
        found.list.push_back(static_cast<int32_t>(j));
        if (static_cast<int64_t>(found.list.size()) > few) listing &= ~(1u << i);
      }
    }
  }

  void finish() {
    for (int i = 0; i < count; ++i) {
      candidates[i].nearest = static_cast<int64_t>(nearest[i]);
      candidates[i].nearest_r = nearest_r[i];
      candidates[i].smallest = smallest[i];
    }
  }
};

// A piece has the queries of a cache line, and some of the blocks.
inline Shares selection_shares(const Screen& screen) {
  const auto one = [](int64_t) { return 1; };
  const int64_t vectors = screen.tiles.padded() / kFloatLanes;
  return {screen.p.num_threads, vectors, one, screen.num_blocks(), 1};
}

template <class Element, class Largest>
void select_as(const Screen& screen, const Largest& largest, std::vector<Candidates>& candidates) {
  const FieldParams& p = screen.p;
  const int64_t few = few_candidates(p);
  const Shares shares = selection_shares(screen);
  std::vector<Candidates> found(shares.size() * kFloatLanes);
  const auto scan = [&](int64_t n) {
    const Piece& piece = shares.pieces[n];
    const int64_t first = piece.tile * kFloatLanes, tile = first / kTileQueries;
    const int64_t q = first % kTileQueries;
    Candidates* lanes = found.data() + n * kFloatLanes;
    Selection<Element> halves[] = {{screen, largest, lanes, tile, q},
                                   {screen, largest, lanes + kLanes, tile, q + kLanes}};
    for (int64_t block = piece.first; block < piece.last; ++block) {
      for (Selection<Element>& half : halves) half.scan(block, few);
    }
    for (Selection<Element>& half : halves) half.finish();
  };
  parallel_for(p.num_threads, shares.count(),
               [&](int64_t share, int) { shares.for_pieces(share, scan); });
  const std::vector<int64_t>& rows = screen.tiles.rows;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t* ends = shares.tiles.data() + i / kFloatLanes;
    Candidates& all = candidates[rows[i]];
    all.smallest = found[ends[0] * kFloatLanes + i % kFloatLanes].smallest;
    for (int64_t n = ends[0]; n < ends[1]; ++n) {
      all.append(found[n * kFloatLanes + i % kFloatLanes], few);
    }
  }
}

template <class Largest>
void select(const Screen& screen, const Largest& largest, std::vector<Candidates>& candidates) {
  for (const int64_t b : screen.tiles.rows) candidates[b] = Candidates();
  screen.integers ? select_as<int32_t>(screen, largest, candidates)
                  : select_as<float>(screen, largest, candidates);
}

// Lists the other candidates of query i, counted over all tiles, if they are at most so many.
inline void list_others(const Screen& screen, int64_t i, double limit, int64_t most,
                        Candidates& found) {
  const Bound& bound = screen.bounds[screen.tiles.rows[i]];
  const double* least = screen.least.get() + screen.minima(i / kTileQueries, 0) + i % kTileQueries;
  const int64_t width = screen.tiles.width(i / kTileQueries);
  for (int64_t block = found.listed / screen.block_rows; block < screen.num_blocks(); ++block) {
    if (!(least[block * width] <= limit)) continue;
    const int64_t last = std::min(screen.p.count, (block + 1) * screen.block_rows);
    for (int64_t j = std::max(found.listed, block * screen.block_rows); j < last; ++j) {
      const double error = bound.slope * screen.o.roots[j] + bound.constant;
      if (!(screen.r(i, j) - error <= limit)) continue;
      if (static_cast<int64_t>(found.list.size()) == most) return;
      found.list.push_back(static_cast<int32_t>(j));
    }
  }
  found.too_many = false;
}

// The second pass over a vector of queries costs about as much as direct differences of one query
// to all references: the queries beyond whole vectors are spared it where they seem to have few
// candidates in all.
template <class Largest>
void fill_vectors(const Screen& screen, const Largest& largest,
                  std::vector<Candidates>& candidates) {
  const std::vector<int64_t>& rows = screen.tiles.rows;
  std::vector<int64_t> dense;  // positions
  for (size_t i = 0; i < rows.size(); ++i) {
    if (candidates[rows[i]].too_many) dense.push_back(static_cast<int64_t>(i));
  }
  const auto found = [&](int64_t i) -> Candidates& { return candidates[rows[i]]; };
  const auto end = dense.begin() + dense.size() % kFloatLanes;
  std::partial_sort(dense.begin(), end, dense.end(), [&](int64_t a, int64_t b) {
    return found(a).listed > found(b).listed;  // lists that filled late
  });
  dense.erase(end, dense.end());
  const int64_t most = std::max(few_candidates(screen.p), screen.p.count / 4);
  double total = 0;
  for (const int64_t i : dense) {
    const double share = static_cast<double>(found(i).listed) / static_cast<double>(screen.p.count);
    total += static_cast<double>(found(i).list.size()) / share;
  }
  if (total > static_cast<double>(most)) return;
  parallel_for(screen.p.num_threads, static_cast<int64_t>(dense.size()), [&](int64_t n, int) {
    const int64_t i = dense[n];
    list_others(screen, i, largest(rows[i], found(i).smallest), most, found(i));
  });
}

}  // namespace
}  // namespace pfgm
