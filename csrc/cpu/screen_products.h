// SPDX-License-Identifier: Apache-2.0
// Fills a Screen (screen.h) with products: in float, or of 8-bit digits with 8-bit codes.
#pragma once

#include "screen.h"

namespace pfgm {
namespace {

// Products of every query with the blocks of references, in float.
inline void screen_floats(Screen& screen) {
  const FieldParams& p = screen.p;
  const Tiles& tiles = screen.tiles;
  std::vector<QueryNorms> norms(p.batch);
  const Buffer<float> packed(tiles.padded() * p.dim);
  parallel_for(p.num_threads, tiles.count(), [&](int64_t tile, int) {
    double residuals[kTileQueries];
    const auto value = [&](int64_t i, int64_t c) { return shifted(p, screen.o, tiles.rows[i], c); };
    pack_floats(tiles, tile, p.dim, value, packed.get() + tile * kTileQueries * p.dim, residuals);
    const double roundings = static_cast<double>(kColumnBlock + p.dim / kColumnBlock + 2);
    for (int q = 0; q < tiles.size(tile); ++q) {
      const int64_t b = tiles.row(tile, q);
      screen.bounds[b] =
          make_bound(p, screen.o, b, query_norms(p, screen.o, b), 2.0, residuals[q], roundings);
    }
  });
  const Buffer<float> decoded(p.num_threads * kScreenRows * kColumnBlock);
  parallel_for(p.num_threads, screen.num_blocks(), [&](int64_t block, int thread) {
    const int64_t first = block * kScreenRows, rows = std::min(p.count - first, kScreenRows);
    float* y = decoded.get() + thread * kScreenRows * kColumnBlock;
    for (int64_t column = 0; column < p.dim; column += kColumnBlock) {
      const int64_t columns = std::min<int64_t>(p.dim - column, kColumnBlock);
      decode_block(p, screen.o, first, rows, column, columns, y, kColumnBlock);
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        const int64_t width = tiles.width(tile);
        product<FloatProduct>(y, rows, kColumnBlock, 1,
                              packed.get() + tile * kTileQueries * p.dim + column * width, width,
                              columns, screen.tile_products(tile) + first * width, column > 0);
      }
    }
    for (int64_t tile = 0; tile < tiles.count(); ++tile) screen.bound_block<float>(tile, block);
  });
}

#if defined(PFGM_INTEGER_PRODUCT)
// Integer products with digits of the queries. The first digit alone screens. To refine, the others
// are added to its products, which become r − base: what counts is near zero, and float holds it
// with all its digits. base (B,), or null to screen.
inline void screen_integers(Screen& screen, const double* base) {
  const bool refine = base != nullptr;
  const FieldParams& p = screen.p;
  const Tiles& tiles = screen.tiles;
  const int64_t steps = (p.dim + 3) / 4;
  const int first_digit = refine ? 1 : 0, num_digits = refine ? kDigits - 1 : 1;
  const Buffer<int32_t> packed(num_digits * tiles.padded() * steps);
  const auto packed_digit = [&](int64_t tile, int digit) {
    return packed.get() + (digit - first_digit) * tiles.padded() * steps +
           tile * kTileQueries * steps;
  };
  const Buffer<double> units(tiles.padded()), shifts(tiles.padded());
  std::fill_n(units.get(), tiles.padded(), 0.0);
  std::fill_n(shifts.get(), tiles.padded(), 0.0);
  parallel_for(p.num_threads, tiles.padded() / kFloatLanes, [&](int64_t task, int) {
    const int64_t tile = task * kFloatLanes / kTileQueries, width = tiles.width(tile);
    const int begin = static_cast<int>(task * kFloatLanes % kTileQueries);
    int32_t* to[kDigits] = {};
    for (int n = first_digit; n < first_digit + num_digits; ++n) {
      to[n] = packed_digit(tile, n);
      for (int64_t k = 0; k < steps; ++k) {
        std::fill_n(to[n] + k * width + begin, kFloatLanes, 0);
      }
    }
    for (int q = begin; q < begin + kFloatLanes && q < tiles.size(tile); ++q) {
      const int64_t b = tiles.row(tile, q);
      const Digits digits = pack_digits(p, screen.o, b, q, width, to);
      double sum = 0;  // of all digits, in units of the first
      for (int n = kDigits - 1; n >= 0; --n) sum = digits.sums[n] + sum / kDigitBase;
      units[tile * kTileQueries + q] = digits.unit;
      shifts[tile * kTileQueries + q] = kCodeOrigin * digits.unit * sum;
      Bound& bound = screen.bounds[b];
      bound = make_bound(p, screen.o, b, query_norms(p, screen.o, b), refine ? -1 : 2 * digits.unit,
                         digits.residuals[refine ? kDigits - 1 : 0], 0);
      bound.offset += refine ? base[b] : 2 * kCodeOrigin * digits.unit * digits.sums[0];
      if (refine) shifts[tile * kTileQueries + q] -= base[b] / 2;
    }
  });
  const bool whole = p.dim % 4 == 0;  // else rows are copied, with zeros beyond d
  const Buffer<uint8_t> copies(whole ? 0 : p.num_threads * kScreenRows * steps * 4);
  if (refine) screen.norms = screen.zeros();
  const Buffer<int32_t> digits(p.num_threads * kDigits * kScreenRows * kTileQueries);
  parallel_for(p.num_threads, screen.num_blocks(), [&](int64_t block, int thread) {
    const int64_t first = block * kScreenRows, rows = std::min(p.count - first, kScreenRows);
    const uint8_t* codes = screen.o.codes + first * p.dim;
    if (!whole) {
      uint8_t* copy = copies.get() + thread * kScreenRows * steps * 4;
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(codes + r * p.dim, p.dim, copy + r * steps * 4);
        std::fill(copy + r * steps * 4 + p.dim, copy + (r + 1) * steps * 4, uint8_t{0});
      }
      codes = copy;
    }
    const int32_t* rows_of_four = reinterpret_cast<const int32_t*>(codes);
    int32_t* sums = digits.get() + thread * kDigits * kScreenRows * kTileQueries;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const int64_t width = tiles.width(tile);
      float* out = screen.tile_products(tile) + first * width;
      const auto multiply = [&](int digit, int32_t* to) {
        for (int64_t k = 0; k < steps; k += kColumnBlock) {
          product<IntegerProduct>(rows_of_four + k, rows, steps, 1,
                                  packed_digit(tile, digit) + k * width, width,
                                  std::min<int64_t>(steps - k, kColumnBlock), to, k > 0);
        }
      };
      if (!refine) {
        multiply(0, reinterpret_cast<int32_t*>(out));
        screen.bound_block<int32_t>(tile, block);
        continue;
      }
      const int64_t size = rows * width;
      for (int n = 1; n < kDigits; ++n) multiply(n, sums + (n - 1) * size);
      for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t q = tile * kTileQueries + i % width;
        Vec total = {};
        for (int n = kDigits - 1; n > 0; --n) {
          total = (total + widen(sums + (n - 1) * size + i)) * (1 / kDigitBase);
        }
        total += widen(reinterpret_cast<const int32_t*>(out) + i);
        const Vec product = total * load(units.get() + q) - load(shifts.get() + q);
        narrow(out + i, screen.o.norms[first + i / width] - 2.0 * product);
      }
      screen.bound_block<float>(tile, block);
    }
  });
}
#endif

// Fills a screen with the cheapest products there are; returns whether they are integers.
inline bool screen_references(Screen& screen) {
#if defined(PFGM_INTEGER_PRODUCT)
  if (screen.o.codes) {
    screen_integers(screen, nullptr);
    return true;
  }
#endif
  screen_floats(screen);
  return false;
}

// Adds digits to the integer products of a screen, whose bounds and candidates are those of one
// digit. The products become floats.
inline void refine(Screen& screen, const std::vector<Candidates>& candidates) {
#if defined(PFGM_INTEGER_PRODUCT)
  std::vector<double> base(screen.p.batch);
  for (const int64_t b : screen.tiles.rows) {
    // r of one digit is of the codes, not of y: the offset makes up for it.
    const QueryNorms norms = query_norms(screen.p, screen.o, b);
    base[b] = candidates[b].smallest + screen.bounds[b].offset - norms.squared - norms.t_squared;
  }
  screen_integers(screen, base.data());
#else
  static_cast<void>(screen);
  static_cast<void>(candidates);
#endif
}

}  // namespace
}  // namespace pfgm
