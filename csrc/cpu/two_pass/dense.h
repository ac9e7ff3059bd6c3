// SPDX-License-Identifier: Apache-2.0
// The second pass of the kernels for larger d, over queries that many references carry weight for:
// weights of all references relative to an anchor, and their sums Σ_j w_j y_j by a second product.
// Its screens hold r − base (screen_products.h).
#pragma once

#include "../common/sparse.h"
#include "screen.h"

namespace pfgm {
namespace {

constexpr int64_t kGatherRows = 256;  // references whose terms are summed in float, at most
constexpr int64_t kAlikeRows = 16;    // the same where terms round alike (alike.h)
constexpr int64_t kGatherUnit = 24;   // a multiple of all product_rows()
constexpr int64_t kGatherColumns = 8 * kGatherUnit;
constexpr int64_t kGatherStrip = 4 * kGatherColumns;  // that a task takes at most
// Logits may be off by this much, root mean square. What remains of it in a sum in which no single
// reference weighs more than 1/128 is an order of magnitude less, for the errors are independent.
constexpr double kDenseTolerance = 2.8e-6;
// That errors are independent is an assumption: of references that err alike nothing averages. So
// the coefficients of some are compared with what direct differences give.
constexpr int kSampled = 8;
struct Errors {
  double mean, root_mean_square;
};
// What is left out of a query moves all logits alike, by this much at most, root mean square.
constexpr double kResidualTolerance = 5e-7;

// Whether the products of a query are precise enough for the weights of all its references.
inline bool certify(const Screen& screen, int64_t b, int64_t anchor, double anchor_square) {
  const FieldParams& p = screen.p;
  const Operands& o = screen.o;
  const Bound& bound = screen.bounds[b];
  if (o.alike && bound.roundings > 0) return false;
  const double slope = RadialKernel(p.half_k, p.t[b]).slope(anchor_square);
  const double root_dim = ::sqrt(static_cast<double>(p.dim)), x_norm = ::sqrt(bound.squared);
  // The product of the anchor, from its squared distance: partial sums get as far as that, and by
  // chance as far as ‖x'‖ ‖y‖/√d.
  const double product = (o.norms[anchor] + bound.squared - anchor_square / (o.unit * o.unit)) / 2;
  const double rounding =
      bound.roundings == 0 ? 0 : product_rounding(p.dim, kColumnBlock, product, x_norm * o.radius);
  // What is left out of the query points nowhere in particular.
  const double unit = 2 * slope * o.unit * o.unit, rest = bound.residual * o.radius / root_dim;
  return unit * rest <= kResidualTolerance && unit * (rounding + rest) <= kDenseTolerance;
}

// Moves the columns of some queries from one screen into another.
inline void compact(Screen& from, Screen& to) {
  const int64_t count = from.p.count;
  std::vector<const float*> sources;  // a query's products with the first references
  std::vector<int64_t> strides;
  size_t next = 0;
  for (int64_t tile = 0; tile < from.tiles.count(); ++tile) {
    for (int q = 0; q < from.tiles.size(tile) && next < to.tiles.rows.size(); ++q) {
      if (from.tiles.row(tile, q) != to.tiles.rows[next]) continue;
      sources.push_back(from.tile_products(tile) + q);
      strides.push_back(from.tiles.width(tile));
      ++next;
    }
  }
  parallel_for(from.p.num_threads, to.num_blocks(), [&](int64_t block, int) {
    const int64_t first = block * to.block_rows;
    for (int64_t j = first; j < std::min(count, first + to.block_rows); ++j) {
      for (int64_t tile = 0; tile < to.tiles.count(); ++tile) {
        float* row = to.tile_products(tile) + j * to.tiles.width(tile);
        const int64_t start = tile * kTileQueries;
        const int size = to.tiles.size(tile);
        for (int q = 0; q < size; ++q) row[q] = sources[start + q][j * strides[start + q]];
        for (int64_t q = size; q < to.tiles.width(tile); ++q) row[q] = 0;
      }
    }
  });
  from.products = Buffer<float>();
  to.integers = from.integers;
  for (const int64_t b : to.tiles.rows) to.bounds[b] = from.bounds[b];
}

inline VecF relative_logits(const FieldParams& p, VecF u) {
  if (p.half_k == INFINITY) return -u;
  // The rounding of k/2 itself would move all logits alike.
  const float high = static_cast<float>(p.half_k);
  const float low = static_cast<float>(p.half_k - high);
  const VecF log = log1p(u);
  return -(log * high) - log * low;
}

// What the weights of a query are relative to. Arrays over the queries of the tiles, padded to
// whole vectors: r and squared distance of a reference near the nearest one, the latter exactly;
// lanes with no query, or with one that another kernel computes, take no part.
struct Anchors {
  std::vector<double> squares, r;  // r = square / unit² − offset, or 0 where that is the base
  std::vector<double> inverse;     // what turns r − r of the anchor into the argument of the logit
  std::vector<float> cutoff;  // logits below this count for nothing: all where no part is taken

  explicit Anchors(int64_t padded)
      : squares(padded), r(padded), inverse(padded), cutoff(padded, INFINITY) {}

  void set(const Screen& screen, int64_t i, double anchor_square, double depth) {
    const int64_t b = screen.tiles.rows[i];
    const RadialKernel kernel(screen.p.half_k, screen.p.t[b]);
    const double scale = screen.o.unit * screen.o.unit;
    squares[i] = anchor_square;
    r[i] = anchor_square / scale - screen.bounds[b].offset;
    inverse[i] =
        kernel.gaussian ? scale * kernel.inverse_two_t2 : scale / (anchor_square + kernel.offset);
    cutoff[i] = static_cast<float>(-depth);
  }
};

// Of a block, of which threads have two each, as they do of Strips.
inline int64_t gather_rows(const FieldParams& p) {
  return even_block(2 * p.num_threads, p.count, kGatherRows);
}

// The second pass over the queries of a screen whose products are floats.
struct SecondPass {
  const Screen& screen;
  const Anchors& anchors;
  const FieldParams& p = screen.p;
  const Operands& o = screen.o;
  const Tiles& tiles = screen.tiles;
  int64_t block_rows = gather_rows(p);
  int64_t num_blocks = (p.count + block_rows - 1) / block_rows;
  Buffer<uint8_t> active{tiles.count() * num_blocks};  // (tiles, blocks): whether any weight counts
  Buffer<double> block_sums{num_blocks * tiles.padded()};  // (blocks, padded)

  SecondPass(const Screen& screen, const Anchors& anchors) : screen(screen), anchors(anchors) {}

  // Calls task(i, b) for the queries that take part.
  template <class Task>
  void for_queries(const Task& task) const {
    parallel_for(p.num_threads, static_cast<int64_t>(tiles.rows.size()), [&](int64_t i, int) {
      if (anchors.cutoff[i] < 0) task(i, tiles.rows[i]);
    });
  }

  // The arguments u of the logits of a reference and kFloatLanes queries from i = 64 tile + q.
  VecF arguments(const float* products, int64_t i) const {
    const auto half = [&](int64_t lane) {
      const Vec r = widen(products + lane);
      return (r - load(&anchors.r[i + lane])) * load(&anchors.inverse[i + lane]);
    };
    return narrow(half(0), half(kLanes));
  }

  // Products become weights relative to the anchors, in place.
  void weigh() const {
    parallel_for(p.num_threads, tiles.count() * num_blocks, [&](int64_t task, int) {
      const int64_t tile = task / num_blocks, block = task % num_blocks;
      const int64_t width = tiles.width(tile), first = block * block_rows;
      bool any = false;
      for (int64_t q = 0; q < width; q += kFloatLanes) {
        const int64_t i = tile * kTileQueries + q;
        const VecF cutoff = load(&anchors.cutoff[i]);
        CompensatedSum sum;
        for (int64_t j = first; j < std::min(p.count, first + block_rows); ++j) {
          float* products = screen.tile_products(tile) + j * width + q;
          const VecF logits = relative_logits(p, arguments(products, i));
          const VecF weights = logits < cutoff ? VecF{} : exp(logits);
          store(products, weights);
          sum.add(weights);
        }
        put(block_sums, block, i, sum.total());
        any |= bits(sum.sum != 0.0f) != 0;
      }
      active[task] = any;
    });
  }

  // Puts the sums over a block for kFloatLanes queries from i into sums (blocks, padded).
  void put(const Buffer<double>& sums, int64_t block, int64_t i, VecF sum) const {
    double* out = sums.get() + block * tiles.padded() + i;
    for (int lane = 0; lane < kFloatLanes; ++lane) out[lane] = sum[lane];
  }

  // What stands in the place of the products of query i, as far apart as its tile is wide.
  float* weights(int64_t i) const { return &screen.product(i, 0); }

  // The total of sums (blocks, padded) for query i.
  double total(const Buffer<double>& sums, int64_t i) const {
    double sum = 0;
    for (int64_t block = 0; block < num_blocks; ++block) sum += sums[block * tiles.padded() + i];
    return sum;
  }

  // What error(j, coefficient) is over some references of query i, drawn by the sizes of the
  // coefficients that stand in the place of the products; 0 where there are none. sizes (blocks,
  // padded): the sums of these.
  template <class Error>
  Errors sample(const Buffer<double>& sizes, int64_t i, const Error& error) const {
    const double share = total(sizes, i) / kSampled;
    Errors errors{0, 0};
    if (share == 0) return errors;
    const float* coefficients = weights(i);
    const int64_t width = tiles.width(i / kTileQueries);
    double before = 0;  // the size of the blocks before this one
    int64_t block = 0, drawn = -1;
    for (int n = 0; n < kSampled; ++n) {
      // At irregular places, for an order may have a period.
      double left = (n + ::fmod(0.618 * (n + 1), 1.0)) * share - before;
      for (; block + 1 < num_blocks; ++block) {
        const double size = sizes[block * tiles.padded() + i];
        if (left < size) break;
        left -= size;
        before += size;
      }
      const int64_t end = std::min(p.count, (block + 1) * block_rows);
      for (int64_t j = block * block_rows; j < end && left >= 0; ++j) {
        const float size = std::abs(coefficients[j * width]);
        left -= size;
        if (size > 0) drawn = j;
      }
      if (drawn < 0) continue;  // what is left of sums from which all was taken
      const double value = error(drawn, coefficients[drawn * width]);
      errors.mean += value / kSampled;
      errors.root_mean_square = ::hypot(errors.root_mean_square, value / ::sqrt(kSampled));
    }
    return errors;
  }

  // (queries, d) Σ_j w_j y_j with what stands in the place of the products as weights. A task takes
  // a strip of columns, so that the weights of a block are read once for several kGatherColumns,
  // and all tiles, for they share what is decoded; where the columns are too few for the threads, a
  // part of the references.
  Buffer<double> gather() const {
    const int64_t size = static_cast<int64_t>(tiles.rows.size()) * p.dim;
    const Strips strips(p.num_threads, p.dim, kGatherStrip);
    const int64_t widest = (p.dim + strips.columns - 1) / strips.columns;
    const int64_t totals_size = widest * tiles.count() * kTileQueries;
    Buffer<double> sums(strips.parts * size);
    const Buffer<float> decoded(p.num_threads * kGatherRows * kGatherColumns);
    const Buffer<float> partial(p.num_threads * kGatherColumns * kTileQueries);
    const Buffer<double> totals(p.num_threads * totals_size);
    parallel_for(p.num_threads, strips.columns * strips.parts, [&](int64_t task, int thread) {
      const int64_t strip = task % strips.columns, part = task / strips.columns;
      gather_strip(p.dim * strip / strips.columns, p.dim * (strip + 1) / strips.columns,
                   num_blocks * part / strips.parts, num_blocks * (part + 1) / strips.parts,
                   decoded.get() + thread * kGatherRows * kGatherColumns,
                   partial.get() + thread * kGatherColumns * kTileQueries,
                   totals.get() + thread * totals_size, sums.get() + part * size);
    });
    if (strips.parts == 1) return sums;
    for_queries([&](int64_t i, int64_t) {
      for (int64_t part = 1; part < strips.parts; ++part) {
        const double* more = sums.get() + part * size + i * p.dim;
        for (int64_t c = 0; c < p.dim; ++c) sums[i * p.dim + c] += more[c];
      }
    });
    return sums;
  }

  // The sums of some columns over some blocks, for all tiles. y, out and totals are work areas.
  void gather_strip(int64_t start, int64_t end, int64_t first_block, int64_t last_block, float* y,
                    float* out, double* totals, double* sums) const {
    const int64_t run = o.alike ? kAlikeRows : kGatherRows;
    const int64_t size = (end - start) * kTileQueries;  // of a tile's totals
    const int64_t steps = (end - start + kGatherColumns - 1) / kGatherColumns;
    const int64_t step = round_up((end - start + steps - 1) / steps, kGatherUnit);
    std::fill_n(totals, size * tiles.count(), 0.0);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * block_rows, rows = std::min(p.count - first, block_rows);
      for (int64_t column = start; column < end; column += step) {
        const int64_t columns = std::min(end - column, step);
        const int64_t next = column + columns < end ? columns : rows * p.dim - (column - start);
        bool decoded = false;
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          if (!active[tile * num_blocks + block]) continue;
          if (!decoded) decode_block(p, o, first, rows, column, columns, y, columns, next);
          decoded = true;
          const int64_t width = tiles.width(tile);
          const float* weights = screen.tile_products(tile) + first * width;
          for (int64_t r = 0; r < rows; r += run) {
            product<FloatProduct>(y + r * columns, columns, 1, columns, weights + r * width, width,
                                  std::min(run, rows - r), out, r > 0);
          }
          double* to = totals + tile * size + (column - start) * width;
          for (int64_t i = 0; i < columns * width; i += kLanes) {
            store(to + i, load(to + i) + widen(out + i));
          }
        }
      }
    }
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const double* total = totals + tile * size;
      for (int q = 0; q < tiles.size(tile); ++q) {
        double* row = sums + (tile * kTileQueries + q) * p.dim;
        for (int64_t c = start; c < end; ++c) row[c] = total[(c - start) * tiles.width(tile) + q];
      }
    }
  }
};

}  // namespace
}  // namespace pfgm
