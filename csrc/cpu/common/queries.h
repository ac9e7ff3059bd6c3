// SPDX-License-Identifier: Apache-2.0
// Queries as the kernels for larger d read them: in tiles of 64, x' = (x − origin)/unit packed
// column by column, so that a vector holds one column of neighbouring queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "operands.h"
#include "product.h"

namespace pfgm {
namespace {

// Weights below exp(−kSingleCutoff)/N of the nearest's cannot be seen in a float32 result.
constexpr double kSingleCutoff = 16;
// A reference with more than 1/128 of the weight is taken by direct differences.
constexpr double kHeavy = 1.0 / 128;
constexpr double kFloatRounding = 0x1p-24;
constexpr double kRounding = 0.42 * kFloatRounding;  // of a number at most that, root mean square
constexpr int kColumnBlock = 256;  // columns whose products are summed in one go, from zero

inline double cutoff_depth(const FieldParams& p) { return kSingleCutoff + log_count(p); }

// The distance from which on float sums of y resolve a displacement: not small beside the data's
// width, of which it may be one over `share`, nor beside what y leaves of a reference.
inline double resolved_distance(const Operands& o, double share) {
  constexpr double kDeviation = 1e-6;
  return o.unit * std::max(o.radius / share, o.deviation / kDeviation);
}

// Whether float sums of y resolve a displacement v: neither it nor the distances that it averages
// may be small. anchor_distance: ‖x − x0_a‖, the smallest of these.
inline bool resolves(const FieldParams& p, const Operands& o, const double* v,
                     double anchor_distance) {
  double squared = anchor_distance * anchor_distance;
  for (int64_t c = 0; c < p.dim; ++c) squared += v[c] * v[c];
  return ::sqrt(squared) >= resolved_distance(o, 4);
}

// Which queries the tiles hold. The last tile is only as wide as it must be.
struct Tiles {
  std::vector<int64_t> rows;  // of the batch

  int64_t count() const {
    return (static_cast<int64_t>(rows.size()) + kTileQueries - 1) / kTileQueries;
  }
  int size(int64_t tile) const {
    return clamp_size(static_cast<int64_t>(rows.size()) - tile * kTileQueries, kTileQueries);
  }
  int64_t width(int64_t tile) const { return round_up(size(tile), kFloatLanes); }
  int64_t padded() const { return round_up(static_cast<int64_t>(rows.size()), kFloatLanes); }
  int64_t row(int64_t tile, int q) const { return rows[tile * kTileQueries + q]; }
};

// What the bounds need to know of a query, in units of the operands.
struct QueryNorms {
  double squared;    // ‖x'‖²
  double t_squared;  // what t adds to s
};

inline double shifted(const FieldParams& p, const Operands& o, int64_t b, int64_t c) {
  return (p.x[b * round_up(p.dim, kPad) + c] - o.origin[c]) * o.inverse_unit;
}

// kLanes neighbouring columns of x', zeros beyond d.
inline Vec shifted_columns(const FieldParams& p, const Operands& o, int64_t b, int64_t c) {
  const double* x = p.x + b * round_up(p.dim, kPad);
  return (load(x + c) - load(&o.origin[c])) * o.inverse_unit;
}

inline QueryNorms query_norms(const FieldParams& p, const Operands& o, int64_t b) {
  constexpr int kChains = kPad / kLanes;  // sums in flight
  Vec sums[kChains] = {};
  for (int64_t c = 0; c < p.dim; c += kPad) {
    for (int i = 0; i < kChains; ++i) {
      const Vec x = shifted_columns(p, o, b, c + i * kLanes);
      sums[i] += x * x;
    }
  }
  double squared = 0;
  for (const Vec sum : sums) squared += reduce_add(sum);
  return {squared, RadialKernel(p.half_k, p.t[b]).offset / (o.unit * o.unit)};
}

// Packs value(i, column) of the queries of a tile, i being the position among those of all tiles,
// (dim, width), zeros beside them. Returns in residuals (64,) the norms of what the rounding to
// float lost.
template <class Value>
void pack_floats(const Tiles& tiles, int64_t tile, int64_t dim, const Value& value, float* packed,
                 double* residuals) {
  const int64_t width = tiles.width(tile);
  std::fill(packed, packed + dim * width, 0.0f);
  for (int q = 0; q < tiles.size(tile); ++q) residuals[q] = 0;
  for (int64_t start = 0; start < dim; start += kFloatLanes) {  // whole lines of the cache
    const int64_t end = std::min(dim, start + kFloatLanes);
    for (int q = 0; q < tiles.size(tile); ++q) {
      for (int64_t c = start; c < end; ++c) {
        const double exact = value(tile * kTileQueries + q, c);
        const float rounded = static_cast<float>(exact);
        packed[c * width + q] = rounded;
        residuals[q] += (exact - rounded) * (exact - rounded);
      }
    }
  }
  for (int q = 0; q < tiles.size(tile); ++q) residuals[q] = ::sqrt(residuals[q]);
}

#if defined(PFGM_INTEGER_PRODUCT)
constexpr int kDigits = 4;  // three would do for all but equal references, which err alike
// Each digit has 1/254 of the unit of the one before: remainders of half a unit become ±127.
constexpr double kDigitBase = 254;

struct Digits {
  double unit;                // of the first digit
  double residuals[kDigits];  // ‖x' − its first n + 1 digits‖
  double sums[kDigits];       // n-th digits · origin's codes: codes are multiplied, not y
};

// Packs digits of x', four columns to a step, (dim/4, width) for each digit up to `end`; those of
// which packed is null are left out.
inline Digits pack_digits(const FieldParams& p, const Operands& o, int64_t b, int q, int64_t width,
                          int end, int32_t* const (&packed)[kDigits]) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const int64_t ld = round_up(p.dim, kPad), steps = (p.dim + 3) / 4;
  Vec most = {};
  for (int64_t c = 0; c < ld; c += kLanes) {
    const Vec x = shifted_columns(p, o, b, c), size = x < 0.0 ? -x : x;
    most = size > most ? size : most;
  }
  double largest = 1e-280;  // of which the last digit's unit has an inverse
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  Digits digits{largest / 127, {}, {}};
  double units[kDigits], inverses[kDigits];
  for (int n = 0; n < kDigits; ++n) {
    units[n] = n == 0 ? digits.unit : units[n - 1] / kDigitBase;
    inverses[n] = 1 / units[n];
  }
  Vec sums[kDigits] = {}, residuals[kDigits] = {};
  for (int64_t c = 0; c < ld; c += kLanes) {
    Vec rest = shifted_columns(p, o, b, c);
    for (int n = 0; n < end; ++n) {
      const Vec digit = (rest * inverses[n] + kRoundMagic) - kRoundMagic;
      rest -= digit * units[n];
      sums[n] += digit * widen(&o.origin_codes[c]);
      residuals[n] += rest * rest;
      if (!packed[n]) continue;
      const Bytes bytes = __builtin_convertvector(digit, Bytes);
      for (int64_t i = 0; i < kLanes / 4 && c / 4 + i < steps; ++i) {
        __builtin_memcpy(packed[n] + (c / 4 + i) * width + q,
                         reinterpret_cast<const char*>(&bytes) + 4 * i, 4);
      }
    }
  }
  for (int n = 0; n < end; ++n) {
    digits.sums[n] = reduce_add(sums[n]);
    digits.residuals[n] = ::sqrt(reduce_add(residuals[n]));
  }
  return digits;
}
#endif

}  // namespace
}  // namespace pfgm
