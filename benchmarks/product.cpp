// SPDX-License-Identifier: Apache-2.0
// The float product of the kernels by itself, in the order of screen_floats
// (csrc/cpu/two_pass/screen_products.h): threads share out blocks of references, and some columns
// of a block at a time meet all tiles of queries. What is left out is the decoding of references:
// they are read where they are.

#define PFGM_ISA native
#include "../csrc/cpu/two_pass/screen.h"

using namespace pfgm;

extern "C" int tile_queries() { return kTileQueries; }

// packed[tile][k][q] = x_q[k] of float queries x (batch, dim), the batch being a multiple of the
// tile.
extern "C" void pack_queries(int threads, int64_t batch, int64_t dim, const float* x,
                             float* packed) {
  Tiles tiles;
  for (int64_t b = 0; b < batch; ++b) tiles.rows.push_back(b);
  parallel_for(threads, tiles.count(), [&](int64_t tile, int) {
    double residuals[kTileQueries];
    const auto value = [&](int64_t b, int64_t c) { return x[b * dim + c]; };
    pack_floats(tiles, tile, dim, value, packed + tile * kTileQueries * dim, residuals);
  });
}

// out[tile][j][q] = x0_j · x_q of packed queries and float references x0 (count, dim).
extern "C" void tile_products(int threads, int64_t tiles, int64_t count, int64_t dim,
                              const float* packed, const float* x0, float* out) {
  const int64_t blocks = (count + kScreenRows - 1) / kScreenRows;
  parallel_for(threads, blocks, [&](int64_t block, int) {
    const int64_t first = block * kScreenRows, rows = std::min(count - first, kScreenRows);
    for (int64_t column = 0; column < dim; column += kColumnBlock) {
      const int64_t columns = std::min<int64_t>(dim - column, kColumnBlock);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        product<FloatProduct>(x0 + first * dim + column, rows, dim, 1,
                              packed + (tile * dim + column) * kTileQueries, kTileQueries, columns,
                              out + (tile * count + first) * kTileQueries, column > 0);
      }
    }
  });
}
