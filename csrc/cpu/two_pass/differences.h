// SPDX-License-Identifier: Apache-2.0
// Squared distances by direct differences in double, of the queries of a screen whose products are
// not precise enough for a second pass: a product costs half of it, the exact kernel several times.
#pragma once

#include "dense.h"

namespace pfgm {
namespace {

// Doubles fill more vectors than floats: a tile may be narrower.
inline int64_t double_width(const Tiles& tiles, int64_t tile) {
  return round_up(tiles.size(tile), kLanes);
}

// Packs queries column by column, as product() reads them: (dim, width) for each tile.
inline void pack_doubles(const FieldParams& p, const Tiles& tiles, double* packed) {
  parallel_for(p.num_threads, tiles.count(), [&](int64_t tile, int) {
    const int64_t width = double_width(tiles, tile);
    double* to = packed + tile * kTileQueries * p.dim;
    for (int64_t q = 0; q < width; ++q) {  // lanes beyond the last query repeat it
      const int64_t b = tiles.row(tile, std::min(static_cast<int>(q), tiles.size(tile) - 1));
      const double* x = p.x + b * round_up(p.dim, kPad);
      for (int64_t c = 0; c < p.dim; ++c) to[c * width + q] = x[c];
    }
  });
}

// Columns of one reference.
inline void read_columns(const RowReader& reader, int64_t j, int64_t first, int64_t columns,
                         double* out) {
  with_row(reader, j, [&](const auto& row) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(out + c, row.read(first + c));
    for (; c < columns; ++c) out[c] = row.read_one(first + c);
  });
}

// Puts what direct differences give for r − r of the anchor in the place of the products of some
// queries, and returns which references are the nearest to these. indices: their positions among
// the queries of the screen.
inline std::vector<int64_t> subtract(const Screen& screen, const Anchors& anchors,
                                     const std::vector<int64_t>& indices) {
  const FieldParams& p = screen.p;
  const double scale = screen.o.inverse_unit * screen.o.inverse_unit;
  const RowReader reader(p);
  Tiles tiles;
  for (const int64_t i : indices) tiles.rows.push_back(screen.tiles.rows[i]);
  const Buffer<double> packed(tiles.padded() * p.dim);
  pack_doubles(p, tiles, packed.get());
  const Buffer<double> references(p.num_threads * kScreenRows * kColumnBlock);
  const Buffer<double> distances(p.num_threads * kScreenRows * tiles.padded());
  parallel_for(p.num_threads, screen.num_blocks(), [&](int64_t block, int thread) {
    const int64_t first = block * screen.block_rows;
    const int64_t rows = std::min(p.count - first, screen.block_rows);
    double* values = references.get() + thread * kScreenRows * kColumnBlock;
    double* squares = distances.get() + thread * kScreenRows * tiles.padded();
    for (int64_t column = 0; column < p.dim; column += kColumnBlock) {
      const int64_t columns = std::min<int64_t>(p.dim - column, kColumnBlock);
      for (int64_t r = 0; r < rows; ++r) {
        read_columns(reader, first + r, column, columns, values + r * kColumnBlock);
      }
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        const int64_t width = double_width(tiles, tile), start = tile * kTileQueries;
        product<SquaredDifferences>(values, rows, kColumnBlock, 1,
                                    packed.get() + start * p.dim + column * width, width, columns,
                                    squares + start * kScreenRows, column > 0);
      }
    }
    for (size_t n = 0; n < indices.size(); ++n) {
      const int64_t tile = n / kTileQueries, width = double_width(tiles, tile), i = indices[n];
      const double* from = squares + tile * kTileQueries * kScreenRows + n % kTileQueries;
      for (int64_t r = 0; r < rows; ++r) {
        const double difference = from[r * width] - anchors.squares[i];
        screen.product(i, first + r) = static_cast<float>(difference * scale);
      }
    }
  });
  std::vector<int64_t> nearest(indices.size());
  parallel_for(p.num_threads, static_cast<int64_t>(indices.size()), [&](int64_t n, int) {
    for (int64_t j = 1; j < p.count; ++j) {
      const float least = screen.product(indices[n], nearest[n]);
      if (screen.product(indices[n], j) < least) nearest[n] = j;
    }
  });
  return nearest;
}

}  // namespace
}  // namespace pfgm
