// SPDX-License-Identifier: Apache-2.0
// Fills a Screen (screen.h) with products: in float, or of 8-bit digits with 8-bit codes.
#pragma once

#include "screen.h"

namespace pfgm {
namespace {

// Products of references first to first + rows with what is packed for each tile, (dim, width), in
// float: out(tile) is (rows, width). y: work area of rows × kColumnBlock.
template <class Out>
void multiply_floats(const FieldParams& p, const Operands& o, const Tiles& tiles, int64_t first,
                     int64_t rows, float* y, const float* packed, const Out& out) {
  for (int64_t column = 0; column < p.dim; column += kColumnBlock) {
    const int64_t columns = std::min<int64_t>(p.dim - column, kColumnBlock);
    decode_block(p, o, first, rows, column, columns, y, kColumnBlock, columns);
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const int64_t width = tiles.width(tile);
      product<FloatProduct>(y, rows, kColumnBlock, 1,
                            packed + tile * kTileQueries * p.dim + column * width, width, columns,
                            out(tile), column > 0);
    }
  }
}

// Products of every query with the blocks of references, in float.
inline void screen_floats(Screen& screen) {
  const FieldParams& p = screen.p;
  const Tiles& tiles = screen.tiles;
  const Buffer<float> packed(tiles.padded() * p.dim);
  parallel_for(p.num_threads, tiles.count(), [&](int64_t tile, int) {
    double residuals[kTileQueries];
    const auto value = [&](int64_t i, int64_t c) { return shifted(p, screen.o, tiles.rows[i], c); };
    pack_floats(tiles, tile, p.dim, value, packed.get() + tile * kTileQueries * p.dim, residuals);
    const double roundings = static_cast<double>(kColumnBlock + p.dim / kColumnBlock + 2);
    for (int q = 0; q < tiles.size(tile); ++q) {
      const int64_t b = tiles.row(tile, q);
      screen.bounds[b] =
          make_bound(p, screen.o, query_norms(p, screen.o, b), 2.0, residuals[q], roundings);
    }
  });
  const Buffer<float> decoded(p.num_threads * kScreenRows * kColumnBlock);
  parallel_for(p.num_threads, screen.num_blocks(), [&](int64_t block, int thread) {
    const int64_t first = block * screen.block_rows;
    const int64_t rows = std::min(p.count - first, screen.block_rows);
    multiply_floats(
        p, screen.o, tiles, first, rows, decoded.get() + thread * kScreenRows * kColumnBlock,
        packed.get(),
        [&](int64_t tile) { return screen.tile_products(tile) + first * tiles.width(tile); });
    for (int64_t tile = 0; tile < tiles.count(); ++tile) screen.bound_block<float>(tile, block);
  });
}

#if defined(PFGM_INTEGER_PRODUCT)
// Integer products with digits of the queries. The first digit alone screens. To refine, the others
// are added to its products, which become r − base.
struct IntegerProducts {
  Screen& screen;
  const double* base;  // (B,), or null to screen
  const FieldParams& p = screen.p;
  const Tiles& tiles = screen.tiles;
  int64_t steps = (p.dim + 3) / 4;
  int first_digit = base ? 1 : 0, end_digit = base ? kDigits : 1;
  Buffer<int32_t> packed{(end_digit - first_digit) * tiles.padded() * steps};
  std::vector<double> units, shifts;  // (padded,)

  IntegerProducts(Screen& screen, const double* base)
      : screen(screen), base(base), units(tiles.padded()), shifts(tiles.padded()) {}

  void run() {
    screen.integers = !base;
    parallel_for(p.num_threads, tiles.padded() / kFloatLanes, [&](int64_t task, int) {
      pack(task * kFloatLanes / kTileQueries, static_cast<int>(task * kFloatLanes % kTileQueries));
    });
    const Buffer<uint8_t> copies(p.num_threads * kScreenRows * steps * 4);
    const Buffer<int32_t> digits(p.num_threads * kDigits * kScreenRows * kTileQueries);
    parallel_for(p.num_threads, screen.num_blocks(), [&](int64_t block, int thread) {
      const int64_t first = block * screen.block_rows;
      const int64_t rows = std::min(p.count - first, screen.block_rows);
      const int32_t* codes =
          read_codes(first, rows, copies.get() + thread * kScreenRows * steps * 4);
      int32_t* sums = digits.get() + thread * kDigits * kScreenRows * kTileQueries;
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        float* out = screen.tile_products(tile) + first * tiles.width(tile);
        if (base) {
          add_digits(tile, codes, first, rows, sums, out);
          screen.bound_block<float>(tile, block);
        } else {
          multiply(tile, 0, codes, rows, reinterpret_cast<int32_t*>(out));
          screen.bound_block<int32_t>(tile, block);
        }
      }
    });
  }

  int32_t* packed_digit(int64_t tile, int digit) const {
    return packed.get() + (digit - first_digit) * tiles.padded() * steps +
           tile * kTileQueries * steps;
  }

  // Packs kFloatLanes queries of a tile and bounds their products.
  void pack(int64_t tile, int begin) {
    const int64_t width = tiles.width(tile);
    int32_t* to[kDigits] = {};
    for (int n = first_digit; n < end_digit; ++n) {
      to[n] = packed_digit(tile, n);
      for (int64_t k = 0; k < steps; ++k) std::fill_n(to[n] + k * width + begin, kFloatLanes, 0);
    }
    for (int q = begin; q < begin + kFloatLanes && q < tiles.size(tile); ++q) {
      const int64_t b = tiles.row(tile, q), i = tile * kTileQueries + q;
      const Digits digits = pack_digits(p, screen.o, b, q, width, end_digit, to);
      double sum = 0;  // for all digits, in units of the first
      for (int n = end_digit - 1; n >= 0; --n) sum = digits.sums[n] + sum / kDigitBase;
      units[i] = digits.unit;
      shifts[i] = digits.unit * sum;
      Bound& bound = screen.bounds[b];
      bound = make_bound(p, screen.o, query_norms(p, screen.o, b), base ? -1 : 2 * digits.unit,
                         digits.residuals[end_digit - 1], 0);
      bound.offset += base ? base[b] : 2 * digits.unit * digits.sums[0];
      if (base) shifts[i] -= base[b] / 2;
    }
  }

  // Codes, (rows, steps) of four columns each: a copy with zeros beyond d where there must be some.
  const int32_t* read_codes(int64_t first, int64_t rows, uint8_t* copy) const {
    const uint8_t* codes = screen.o.codes + first * p.dim;
    if (p.dim % 4 == 0) return reinterpret_cast<const int32_t*>(codes);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(codes + r * p.dim, p.dim, copy + r * steps * 4);
      std::fill(copy + r * steps * 4 + p.dim, copy + (r + 1) * steps * 4, uint8_t{0});
    }
    return reinterpret_cast<const int32_t*>(copy);
  }

  void multiply(int64_t tile, int digit, const int32_t* codes, int64_t rows, int32_t* out) const {
    const int64_t width = tiles.width(tile);
    for (int64_t k = 0; k < steps; k += kColumnBlock) {
      product<IntegerProduct>(codes + k, rows, steps, 1, packed_digit(tile, digit) + k * width,
                              width, std::min<int64_t>(steps - k, kColumnBlock), out, k > 0);
    }
  }

  // Turns products of the first digit into r − base. sums: work area of the other digits.
  void add_digits(int64_t tile, const int32_t* codes, int64_t first, int64_t rows, int32_t* sums,
                  float* out) const {
    const int64_t width = tiles.width(tile), size = rows * width;
    for (int n = 1; n < kDigits; ++n) multiply(tile, n, codes, rows, sums + (n - 1) * size);
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t q = tile * kTileQueries + i % width;
      Vec total = {};
      for (int n = kDigits - 1; n > 0; --n) {
        total = (total + widen(sums + (n - 1) * size + i)) * (1 / kDigitBase);
      }
      total += widen(reinterpret_cast<const int32_t*>(out) + i);
      const Vec product = total * load(&units[q]) - load(&shifts[q]);
      narrow(out + i, screen.o.norms[first + i / width] - 2.0 * product);
    }
  }
};
#endif

// Fills a screen with the cheapest products there are.
inline void screen_references(Screen& screen) {
#if defined(PFGM_INTEGER_PRODUCT)
  if (screen.o.codes) return IntegerProducts(screen, nullptr).run();
#endif
  screen_floats(screen);
}

// The float products of a screen become r − base.
inline void rebase(Screen& screen, const double* base) {
  const Tiles& tiles = screen.tiles;
  std::vector<double> bases(tiles.padded());
  for (size_t i = 0; i < tiles.rows.size(); ++i) {
    Bound& bound = screen.bounds[tiles.rows[i]];
    bases[i] = base[tiles.rows[i]];
    bound.offset += bases[i];
    bound.factor = -1;
  }
  parallel_for(screen.p.num_threads, screen.num_blocks(), [&](int64_t block, int) {
    const int64_t first = block * screen.block_rows;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const int64_t width = tiles.width(tile);
      for (int64_t j = first; j < std::min(screen.p.count, first + screen.block_rows); ++j) {
        float* row = screen.tile_products(tile) + j * width;
        for (int64_t q = 0; q < width; q += kLanes) {
          const Vec r = screen.o.norms[j] - 2.0 * widen(row + q);
          narrow(row + q, r - load(&bases[tile * kTileQueries + q]));
        }
      }
    }
  });
}

// The products of a screen, whose candidates are known, become r − base: what counts is near zero,
// and float holds it with all its digits. Digits are added to integer products: returns whether
// that was done, so that bounds and candidates are out of date.
inline bool refine(Screen& screen, const std::vector<Candidates>& candidates) {
  std::vector<double> base(screen.p.batch);
  for (const int64_t b : screen.tiles.rows) {
    // r of one digit is of the codes, not of y: the offset makes up for it.
    const Bound& bound = screen.bounds[b];
    base[b] = candidates[b].smallest + bound.offset - bound.squared;
  }
  screen.zeros.assign(screen.p.count, 0.0);
  screen.norms = screen.zeros.data();
#if defined(PFGM_INTEGER_PRODUCT)
  if (screen.integers) {
    IntegerProducts(screen, base.data()).run();
    return true;
  }
#endif
  rebase(screen, base.data());
  return false;
}

}  // namespace
}  // namespace pfgm
