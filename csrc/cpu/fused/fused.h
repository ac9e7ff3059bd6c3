// SPDX-License-Identifier: Apache-2.0
// What the fused kernels for 24 < d ≤ 256 share: one pass over the references in blocks that stay
// in the cache, with nothing of size B · N in memory. References on a grid go elsewhere: their few
// values round alike. A product
//
//   r_j = (‖y_j‖² − centre) − 2 x'·y_j,   s_j / unit² = r_j + offset
//
// becomes weights where it lies, and a second product of the same block sums the references with
// them. ‖y_j‖² is one more column of the references and of the queries, whose other columns are −2
// x'.
#pragma once

#include "../common/bounds.h"
#include "../common/shares.h"
#include "../common/sparse.h"

namespace pfgm {
namespace {

constexpr int64_t kFusedRows = 240;  // references in a block, a multiple of all product_rows()
constexpr int64_t kFusedDepth = 64;  // columns whose products are summed in one go, about
constexpr int64_t kGatherStep = 80;  // references whose weights stay in the first-level cache
// References that are weighed together, so that none waits for itself; their values stay in
// registers.
constexpr int kWeighRows = kFloatLanes == 16 ? 8 : 4;
constexpr int64_t kFusedPart = 4 * kFusedRows;
// Logits may be off by this much if all roundings of a product added up.
constexpr double kFusedTolerance = 4e-5;
constexpr double kLeastS = 1e-30;  // of which a float holds the reciprocal

// The middle of ‖y‖²: what is left of the norms is rounded to float (round_by_turns).
inline double norm_centre(const FieldParams& p, const Operands& o) {
  return (o.norms[0] + o.norms[p.count / 2] + o.norms[p.count - 1]) / 3;
}

// v to 23 bits, rounded up or down by turns: as often as makes v the mean over any run of indices.
// References that are all as far from a query must not round alike, neither their norms nor, once
// products are added, what r is then rounded to: hence one bit less than a float has.
inline float round_by_turns(double v, int64_t index) {
  constexpr uint64_t kDropped = (uint64_t{1} << 30) - 1;
  constexpr uint32_t kGolden = 2654435769u;  // whose multiples are spread most evenly
  uint64_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  bits = (bits + ((static_cast<uint32_t>(index) * kGolden) >> 2)) & ~kDropped;
  __builtin_memcpy(&v, &bits, sizeof bits);
  return static_cast<float>(v);
}
constexpr double kTurnsRounding = 4 * kFloatRounding;  // of a number at most that, at most

// Columns whose products are summed in one go, of so many.
inline int64_t sum_depth(int64_t columns) {
  const int64_t sums = std::max<int64_t>(1, (columns + kFusedDepth / 2) / kFusedDepth);
  return (columns + sums - 1) / sums;
}

inline Shares fused_shares(const FieldParams& p, const Tiles& tiles) {
  const auto width = [&](int64_t tile) { return tiles.width(tile); };
  return {p.num_threads, tiles.count(), width, p.count, kFusedPart};
}

// A block of references as floats, (rows, dim + 1), the last column being ‖y‖² − centre.
struct FusedBlock {
  float* y;
  const float* origin;  // (dim,)
  int64_t dim, rows = 0;

  static int64_t size(int64_t dim) { return kFusedRows * (dim + 1); }

  void read(const FieldParams& p, const Operands& o, double centre, int64_t first, int64_t count) {
    rows = count;
    if (p.value_type == ValueType::kUint8) {
      decode_block(p, o, first, rows, 0, dim, y, dim + 1, rows * dim);
    } else {
      subtract_origin(static_cast<const float*>(p.values) + first * dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      y[r * (dim + 1) + dim] = round_by_turns(o.norms[first + r] - centre, first + r);
    }
  }

  // What decode_block does with floats, whose origin is a float: the rounded difference is the
  // same.
  void subtract_origin(const float* values) const {
    const int64_t columns = dim, last = dim - kFloatLanes;  // of which there are more than 24
    const float* by = origin;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = values + r * columns;
      float* to = y + r * (columns + 1);
      prefetch(from + rows * columns, columns * 4);
      for (int64_t c = 0; c < last; c += kFloatLanes) {
        store(to + c, load(from + c) - load(by + c));
      }
      store(to + last, load(from + last) - load(by + last));
    }
  }

  // out (rows, width) = the first `depth` columns times packed (depth, width), in a few sums from
  // zero.
  void multiply(const float* packed, int64_t depth, int64_t width, float* out) const {
    const int64_t step = sum_depth(depth);
    for (int64_t c = 0; c < depth; c += step) {
      product<FloatProduct>(y + c, rows, dim + 1, 1, packed + c * width, width,
                            std::min(step, depth - c), out, c > 0);
    }
  }

  // out (dim, width) = Σ_r y_r weights_r of weights (rows, width).
  void gather(const float* weights, int64_t width, float* out) const {
    for (int64_t r = 0; r < rows; r += kGatherStep) {
      product<FloatProduct>(y + r * (dim + 1), dim, 1, dim + 1, weights + r * width, width,
                            std::min(kGatherStep, rows - r), out, r > 0);
    }
  }
};

// Of rows that are so far apart.
inline VecF smallest(const float* r, int64_t apart, int64_t rows) {
  VecF least[4];  // more than one, so that none waits for the one before
  std::fill_n(least, 4, broadcast(INFINITY));
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) {
    for (int i = 0; i < 4; ++i) least[i] = smaller(load(r + (j + i) * apart), least[i]);
  }
  for (; j < rows; ++j) least[0] = smaller(load(r + j * apart), least[0]);
  return smaller(smaller(least[0], least[1]), smaller(least[2], least[3]));
}

// u is at most this, so that log1p_finite and exp_normal do, which are faster.
constexpr float kMostU = 1e30f;

// (k/2) log1p(u), or u for the Gaussian kernel, as scale · log + correction · log: the correction
// makes up for the rounding of k/2 and, to first order, of the factor in u, which would move all
// logits the same way.
struct LogitScale {
  bool gaussian;
  float scale;

  explicit LogitScale(double half_k)
      : gaussian(half_k == INFINITY), scale(gaussian ? 1 : static_cast<float>(half_k)) {}

  float correction(double half_k, double exact, float rounded) const {
    return static_cast<float>((gaussian ? 1 : half_k) * (exact / rounded) - scale);
  }
  VecF logits(VecF u, VecF correction) const {
    const VecF log = gaussian ? u : log1p_finite(u);
    return -(log * scale) - log * correction;
  }
};

// A query, in units of the operands where nothing else is said.
struct FusedQuery {
  RadialKernel kernel;
  Bound bound;
  double offset;   // squared distance / unit² − r
  double error;    // of r at most
  double least_s;  // s of the nearest below which the weights are not precise enough
};

// Work area of a thread.
struct FusedArea {
  Buffer<float> y, packed, r, out;
  Buffer<double> totals;
  explicit FusedArea(int64_t dim)
      : y(FusedBlock::size(dim)),
        packed((dim + 1) * kTileQueries),
        r(kFusedRows * kTileQueries),
        out(dim * kTileQueries),
        totals(dim * kTileQueries) {}
};

// The queries of a pass over the references, and what does not depend on what is computed.
struct FusedPass {
  const FieldParams& p;
  const Operands& o;
  const Tiles& tiles;
  RowReader reader{p};
  int64_t ld = round_up(p.dim, kPad);
  int64_t size = static_cast<int64_t>(tiles.rows.size());
  double centre = norm_centre(p, o), spread = 0;  // |‖y‖² − centre| at most
  Shares shares = fused_shares(p, tiles);
  std::vector<float> origin{o.origin.get(), o.origin.get() + p.dim};
  std::vector<FusedQuery> queries{static_cast<size_t>(size)};
  std::vector<FusedArea> areas;
  Buffer<double> others{(shares.size() - tiles.count()) * kTileQueries * ld};

  FusedPass(const FieldParams& p, const Operands& o, const Tiles& tiles)
      : p(p), o(o), tiles(tiles) {
    for (int64_t j = 0; j < p.count; ++j) spread = std::max(spread, std::abs(o.norms[j] - centre));
    for (int i = 0; i < p.num_threads; ++i) areas.emplace_back(p.dim);
    parallel_for(p.num_threads, tiles.count(), [&](int64_t tile, int thread) {
      double residuals[kTileQueries];
      pack(tiles, tile, areas[thread].packed.get(), residuals);
      for (int q = 0; q < tiles.size(tile); ++q) {
        queries[tile * kTileQueries + q] = make_query(tiles.row(tile, q), residuals[q] / 2);
      }
    });
  }

  FusedQuery make_query(int64_t b, double residual) const {
    const QueryNorms norms = query_norms(p, o, b);
    const double roundings = static_cast<double>(p.dim) + 2, root = ::sqrt(norms.squared);
    FusedQuery query;
    query.kernel = RadialKernel(p.half_k, p.t[b]);
    query.bound = make_bound(p, o, norms, 2, residual, roundings);
    query.offset = query.bound.offset + centre;
    query.error = query.bound.slope * o.radius + query.bound.constant +
                  (kTurnsRounding + kFloatRounding) * spread;
    const double slope = query.kernel.gaussian ? query.kernel.inverse_two_t2 : p.half_k;
    const double error =
        2 * (kFloatRounding * root + residual) * o.radius + kFloatRounding * spread;
    const double least = slope * error * o.unit * o.unit / kFusedTolerance;
    const bool fine = least <= 1 && slope < 1 / kLeastS;
    query.least_s = !query.kernel.gaussian ? std::max(kLeastS, least) : fine ? 0 : INFINITY;
    return query;
  }

  // What r is off by, root mean square, where x'·y is so much, but for what float leaves out of x'.
  double rounding(int64_t i, double product) const {
    constexpr double kTurns = 0.3 * kTurnsRounding;
    const double norms = ::sqrt(queries[i].bound.squared) * o.radius;
    const double error = product_rounding(p.dim + 1, sum_depth(p.dim + 1), product, norms);
    return ::hypot(2 * error, kTurns * spread);
  }

  // Packs −2 x' and ones below, (dim + 1, width).
  void pack(const Tiles& from, int64_t tile, float* packed, double* residuals) const {
    const auto value = [&](int64_t i, int64_t c) { return -2 * shifted(p, o, from.rows[i], c); };
    pack_floats(from, tile, p.dim, value, packed, residuals);
    std::fill_n(packed + p.dim * from.width(tile), from.width(tile), 1.0f);
  }

  // Calls visit(block, r, first) for the blocks of a piece, with r (rows, width) of its tile.
  template <class Visit>
  void for_blocks(const Tiles& from, const Piece& piece, FusedArea& area,
                  const Visit& visit) const {
    double residuals[kTileQueries];
    pack(from, piece.tile, area.packed.get(), residuals);
    FusedBlock block{area.y.get(), origin.data(), p.dim};
    for (int64_t first = piece.first; first < piece.last; first += kFusedRows) {
      block.read(p, o, centre, first, std::min(piece.last - first, kFusedRows));
      block.multiply(area.packed.get(), p.dim + 1, from.width(piece.tile), area.r.get());
      visit(block, area.r.get(), first);
    }
  }

  // The first and the last + 1 of the pieces that hold query i.
  std::pair<int64_t, int64_t> pieces_of(int64_t i) const {
    const int64_t tile = i / kTileQueries;
    return {shares.tiles[tile], shares.tiles[tile + 1]};
  }
  // Where an array (pieces, 64) has query i of a piece.
  static int64_t place(int64_t piece, int64_t i) { return piece * kTileQueries + i % kTileQueries; }

  // A row of ld values of a piece: in `out` (B, ld) for the first one of its tile.
  double* row(int64_t piece, int64_t i, double* out) const {
    const int64_t tile = i / kTileQueries;
    if (piece == shares.tiles[tile]) return out + tiles.rows[i] * ld;
    return others.get() + place(piece - tile - 1, i) * ld;
  }

  // Finishes those of the queries `index` by direct differences, g (B, ld) or null, that have few
  // references whose r is at most limit(i); the others are left uncertified.
  template <class Limit, class Finish>
  void finish_sparse(const std::vector<int64_t>& index, uint8_t* uncertified, const double* g,
                     const Limit& limit, const Finish& finish) {
    if (index.empty()) return;
    Tiles rest;
    for (const int64_t i : index) rest.rows.push_back(tiles.rows[i]);
    const Shares rest_shares = fused_shares(p, rest);
    std::vector<std::vector<int32_t>> lists(rest_shares.size() * kTileQueries);
    parallel_for(p.num_threads, rest_shares.count(), [&](int64_t share, int thread) {
      rest_shares.for_pieces(share, [&](int64_t n) {
        const Piece& piece = rest_shares.pieces[n];
        float limits[kTileQueries];
        std::fill_n(limits, kTileQueries, -INFINITY);
        for (int q = 0; q < rest.size(piece.tile); ++q) {
          limits[q] = limit(index[piece.tile * kTileQueries + q]);
        }
        list_candidates(rest, piece, limits, lists.data() + n * kTileQueries, areas[thread]);
      });
    });
    parallel_for(p.num_threads, static_cast<int64_t>(index.size()), [&](int64_t i, int) {
      const int64_t* ends = rest_shares.tiles.data() + i / kTileQueries;
      std::vector<int32_t>& all = lists[place(ends[0], i)];
      for (int64_t n = ends[0] + 1; n < ends[1]; ++n) {
        const std::vector<int32_t>& more = lists[place(n, i)];
        all.insert(all.end(), more.begin(), more.end());
      }
      const int64_t found = static_cast<int64_t>(all.size());
      // Of gradients the anchor may be one of other chunks, beside which none of these counts.
      const bool lost = all.empty() && !(g && std::isfinite(limit(index[i])));
      uncertified[rest.rows[i]] = lost || found > few_candidates(p);
      if (uncertified[rest.rows[i]]) return;
      SparseQuery query{rest.rows[i], &all, std::vector<Pair>(found)};
      compute_pairs(reader, g, query, 0, found);
      finish(p, reader, query);
    });
  }

  void list_candidates(const Tiles& rest, const Piece& piece, float* limits,
                       std::vector<int32_t>* lists, FusedArea& area) const {
    const int64_t width = rest.width(piece.tile), few = few_candidates(p);
    for_blocks(rest, piece, area, [&](FusedBlock& block, float* r, int64_t first) {
      for (int64_t v = 0; v < width; v += kFloatLanes) {
        for (int64_t j = 0; j < block.rows; ++j) {
          const VecFInt listed = load(r + j * width + v) <= load(limits + v);
          for (unsigned mask = bits(listed); mask; mask &= mask - 1) {
            const int64_t q = v + __builtin_ctz(mask);
            lists[q].push_back(static_cast<int32_t>(first + j));
            if (static_cast<int64_t>(lists[q].size()) > few) limits[q] = -INFINITY;
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace pfgm
