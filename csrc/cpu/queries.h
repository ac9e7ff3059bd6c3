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
constexpr int kColumnBlock = 256;  // columns whose products are summed in one go, from zero

// By how much the logit of an anchor that is not heavy, known exactly, may be off in the products:
// that there are others like it may be because there are copies, which err alike.
constexpr double kAnchorTolerance = 8e-7;

inline double cutoff_depth(const FieldParams& p) {
  return kSingleCutoff + ::log(static_cast<double>(p.count));
}

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

inline QueryNorms query_norms(const FieldParams& p, const Operands& o, int64_t b) {
  double squared = 0;
  for (int64_t c = 0; c < p.dim; ++c) {
    const double x = shifted(p, o, b, c);
    squared += x * x;
  }
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

// Packs digits of x', four columns to a step, (dim/4, width) for each digit; digits of which
// packed is null are left out.
inline Digits pack_digits(const FieldParams& p, const Operands& o, int64_t b, int q, int64_t width,
                          int32_t* const (&packed)[kDigits]) {
  double largest = 0;
  for (int64_t c = 0; c < p.dim; ++c) largest = std::max(largest, std::abs(shifted(p, o, b, c)));
  Digits digits{std::max(largest, 1e-300) / 127, {}, {}};
  double units[kDigits], inverses[kDigits];
  for (int n = 0; n < kDigits; ++n) {
    units[n] = n == 0 ? digits.unit : units[n - 1] / kDigitBase;
    inverses[n] = 1 / units[n];
  }
  for (int64_t start = 0; start < p.dim; start += 4) {
    int8_t bytes[kDigits][4] = {};
    for (int64_t c = start; c < std::min(p.dim, start + 4); ++c) {
      double rest = shifted(p, o, b, c);
      for (int n = 0; n < kDigits; ++n) {
        const double digit = std::nearbyint(rest * inverses[n]);
        rest -= digit * units[n];
        digits.sums[n] += digit * o.origin_codes[c];
        bytes[n][c - start] = static_cast<int8_t>(digit);
        digits.residuals[n] += rest * rest;
      }
    }
    for (int n = 0; n < kDigits; ++n) {
      if (packed[n]) __builtin_memcpy(packed[n] + start / 4 * width + q, bytes[n], 4);
    }
  }
  for (double& residual : digits.residuals) residual = ::sqrt(residual);
  return digits;
}
#endif

}  // namespace
}  // namespace pfgm
