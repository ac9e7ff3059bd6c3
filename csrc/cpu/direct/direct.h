// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward pass of few dimensions share: direct differences in float.
//
// Vectors run over queries, and the references' coordinates are broadcast. Only squared distances
// are formed in float, never s = ‖x − x0‖² + t²: with the distance at some origin near the nearest
//
//   1 + u = s / scale,  u = (‖x − x0‖² − origin) · inverse + low,  scale = 1 / inverse
//
// holds to float precision relative to u however large t is, `low` taking what the rounding of
// `inverse` leaves over. For the Gaussian kernel u is the logit's size, (‖x − x0‖² − origin)/(2t²).
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../field_math.h"
#include "../common/shares.h"
#include "../common/simd.h"

namespace pfgm {
namespace {

constexpr int kQueries = 64;  // in a tile: they share a decoded block of references
constexpr int kBlock = 256;   // references in a block, whose float sums go into double
constexpr int kRun = 8;       // references whose sums start from zero
constexpr int kColumns = 8;   // columns whose sums stay in registers
constexpr int kMaxDim = 24;   // kMaxDirectDim
constexpr int64_t kDirectPart = 4 * kBlock;
constexpr int kTileVectors = kQueries / kFloatLanes;

// How weights relative to the scale are computed.
enum class Weighing { kPower, kLogarithm, kGaussian };

// Weights may make log masses, and displacements relative to their terms, be off by this much,
// which leaves something to sums; log masses by that if they are copies' of the nearest.
constexpr double kTolerance = 9e-7, kCrowdTolerance = 6e-7;
// Root mean squares of what float rounds of a squared distance and of k/2 times a logarithm,
// relative to these, and of a weight.
constexpr double kSquareRounding = 4e-8, kLogarithmRounding = 3.5e-8, kWeightRounding = 5e-8;
// Most of what that of a query's differences from references makes of a squared distance: for all
// references alike, as the digits that a query has more than they are the same.
constexpr double kQueryRounding = 0x1p-23;
// The least of that which counts for queries amid the references, where signs differ.
constexpr double kAmid = 0.5;
// On a reference, or copies of one, v is of others: below this share of the weight, with the
// nearest's squared distance below this share of ‖v‖², their weights have too few digits.
constexpr double kFaint = 1e-3;
constexpr double kMostGentle = 4;  // k/2 up to which powers are precise whatever the weights

constexpr int kMaxPower = 40;  // beyond it the rounding of powers exceeds that of logarithms

inline Weighing choose_weighing(double half_k) {
  const double k = 2 * half_k;
  if (half_k == INFINITY) return Weighing::kGaussian;
  if (k != ::floor(k) || k > kMaxPower) return Weighing::kLogarithm;
  return Weighing::kPower;
}

// Calls task(std::integral_constant<Weighing, weighing>).
template <class Task>
void dispatch(Weighing weighing, const Task& task) {
  switch (weighing) {
    case Weighing::kPower:
      return task(std::integral_constant<Weighing, Weighing::kPower>());
    case Weighing::kLogarithm:
      return task(std::integral_constant<Weighing, Weighing::kLogarithm>());
    default:
      return task(std::integral_constant<Weighing, Weighing::kGaussian>());
  }
}

// What the slope of a logit times its squared distance may be for the rounding of the latter, of
// 2e-7 at most, to move it by little enough: it is k/2 at most.
constexpr double kMostSlope = 14;

// Whether float does for a query whose nearest reference is at this squared distance: the range
// holds what is formed.
inline bool fits_float(const RadialKernel& kernel, double distance) {
  const double slope = kernel.slope(distance);
  const double size = kernel.gaussian ? 1 / slope : distance + kernel.offset;
  return size > 1e-25 && size < 1e25 && distance < 1e25 && distance * slope <= kMostSlope;
}

inline Shares direct_shares(const FieldParams& p) {
  const int64_t tiles = (p.batch + kQueries - 1) / kQueries;
  const auto vectors = [&](int64_t tile) {
    return (clamp_size(p.batch - tile * kQueries, kQueries) + kFloatLanes - 1) / kFloatLanes;
  };
  return {p.num_threads, tiles, vectors, p.count, kDirectPart};
}

// A compile-time integer as an argument.
template <int n>
using Constant = std::integral_constant<int, n>;

// Calls task(Constant<first>, Constant<columns>) for every strip of at most kColumns columns.
template <class Task>
void for_strips(int64_t dim, const Task& task) {
  for (int first = 0; first < dim; first += kColumns) {
    switch (clamp_size(dim - first, kColumns)) {
      case 1:
        task(first, Constant<1>());
        break;
      case 2:
        task(first, Constant<2>());
        break;
      case 3:
        task(first, Constant<3>());
        break;
      case 4:
        task(first, Constant<4>());
        break;
      case 5:
        task(first, Constant<5>());
        break;
      case 6:
        task(first, Constant<6>());
        break;
      case 7:
        task(first, Constant<7>());
        break;
      default:
        task(first, Constant<kColumns>());
    }
  }
}

// sums (kFloatLanes,) += v, in double.
inline void accumulate(double* sums, VecF v) {
  float lanes[kFloatLanes];
  store(lanes, v);
  for (int i = 0; i < kFloatLanes; i += kLanes) store(sums + i, load(sums + i) + widen(lanes + i));
}

// References in float, padded to whole runs with copies of the first.
struct DirectBlock {
  alignas(64) float rows[kBlock * kMaxDim];
  int64_t dim;
  int count, padded;

  void load(const FieldParams& p, int64_t first, int n) {
    dim = p.dim;
    count = n;
    padded = static_cast<int>(round_up(n, kRun));
    const int64_t start = first * dim, size = n * dim;
    if (p.value_type == ValueType::kFloat32) {
      const float* values = static_cast<const float*>(p.values) + start;
      for (int64_t i = 0; i < size; ++i) rows[i] = values[i];
    } else {
      const uint8_t* codes = static_cast<const uint8_t*>(p.values) + start;
      for (int64_t i = 0; i < size; ++i) rows[i] = p.table[codes[i]];
    }
    for (int64_t i = size; i < padded * dim; ++i) rows[i] = rows[i % dim];
  }
};

// Squared distances of the queries x[dim] from each reference of a block.
inline void squared_distances(const DirectBlock& block, const VecF* x, VecF* out) {
  for_strips(block.dim, [&](int first, auto columns) {
    constexpr int n = decltype(columns)::value;
    VecF query[n];
    for (int c = 0; c < n; ++c) query[c] = x[first + c];
    const float* row = block.rows + first;
    for (int r = 0; r < block.padded; ++r, row += block.dim) {
      VecF sum = (query[0] - row[0]) * (query[0] - row[0]);
      for (int c = 1; c < n; ++c) {
        const VecF difference = query[c] - row[c];
        sum += difference * difference;
      }
      out[r] = first == 0 ? sum : out[r] + sum;
    }
  });
}

// n sums of the runs of a block, of two and two that are sums of as many. Terms that are equal
// round alike, and beside one that is large: of its sum with 255 others that moves 5e-7 at most.
template <int n>
struct PairwiseSums {
  VecF sums[6][n];  // of 2^i runs each, i falling
  int size = 0, runs = 0;

  void add(VecF* run) {
    for (int i = runs++; i % 2 == 1; i /= 2) absorb(run);
    for (int c = 0; c < n; ++c) sums[size][c] = run[c];
    ++size;
  }

  const VecF* total() {
    while (size > 1) absorb(sums[size - 2]);
    return sums[0];
  }

 private:
  void absorb(VecF* into) {
    --size;
    for (int c = 0; c < n; ++c) into[c] += sums[size][c];
  }
};

// sum += Σ_r weights[r], sums[c] += Σ_r weights[r] (row_r[c] − x[c]), in float within the block.
inline void gather(const DirectBlock& block, const VecF* x, const VecF* weights, double* sum,
                   double (*sums)[kFloatLanes]) {
  for_strips(block.dim, [&](int first, auto columns) {
    constexpr int n = decltype(columns)::value;
    VecF query[n];
    for (int c = 0; c < n; ++c) query[c] = x[first + c];
    PairwiseSums<n + 1> total;
    const float* row = block.rows + first;
    for (int start = 0; start < block.padded; start += kRun) {
      VecF run[n + 1] = {};
      for (int r = start; r < start + kRun; ++r, row += block.dim) {
        for (int c = 0; c < n; ++c) run[c] -= weights[r] * (query[c] - row[c]);
        run[n] += weights[r];
      }
      total.add(run);
    }
    const VecF* strip = total.total();
    for (int c = 0; c < n; ++c) accumulate(sums[first + c], strip[c]);
    if (first == 0) accumulate(sum, strip[n]);
  });
}

// Where weights are relative to, per query of a vector.
struct Scale {
  VecF origin, inverse, low;
  // The squared distance whose s is 1 / inverse; for the Gaussian kernel the origin.
  alignas(64) double square[kFloatLanes];

  // offset: what t adds to s. rate: 1/(2t²) for the Gaussian kernel. In vectors: what GCC 12 makes
  // of a loop over lanes leaves the rounding of `inverse` out of `low`.
  void move(VecF to, const double* offset, const double* rate, bool gaussian) {
    float nearest[kFloatLanes];
    store(nearest, origin = to);
    Vec rounded[2], rest[2];
    for (int half = 0; half < 2; ++half) {
      const int i = half * kLanes;
      const Vec from = widen(nearest + i), s = from + load(offset + i);
      const Vec exact = gaussian ? load(rate + i) : 1.0 / s;
      rounded[half] = round_to_float(exact);
      rest[half] = gaussian ? exact - rounded[half] : s * rounded[half] - 1.0;
      store(square + i, gaussian ? from : 1.0 / rounded[half] - load(offset + i));
    }
    inverse = narrow(rounded[0], rounded[1]);
    low = narrow(rest[0], rest[1]);
  }
};

// Squared distances become weights relative to the scale, in place. NaN and infinity become NaN.
struct Weights {
  double half_k;
  float single;  // k/2
  Weighing weighing;
  int k;
  float second_order;

  explicit Weights(double half_k)
      : half_k(half_k),
        single(static_cast<float>(half_k)),
        weighing(choose_weighing(half_k)),
        k(weighing == Weighing::kPower ? static_cast<int>(2 * half_k) : 0),
        second_order(static_cast<float>(half_k * (half_k + 1) / 2)) {}

  template <Weighing kWeighing, int kCount>
  void weigh(const Scale& scale, VecF* v) const {
    if constexpr (kWeighing == Weighing::kLogarithm) {
      for (int r = 0; r < kCount; ++r) {
        v[r] = log1p((v[r] - scale.origin) * scale.inverse + scale.low);
      }
      for (int r = 0; r < kCount; ++r) v[r] = exp(v[r] * -single);
    } else if constexpr (kWeighing == Weighing::kGaussian) {
      for (int r = 0; r < kCount; ++r) {
        const VecF difference = v[r] - scale.origin;
        const VecF power = exp(difference * -scale.inverse);
        v[r] = power - power * (difference * scale.low);
      }
    } else {
      powers<kCount>(scale, v);
    }
  }

 private:
  // (1 + u)^(−k/2). An approximate root y leaves e = 1 − (1 + u) y², and the power is
  // y^k (1 − e)^(−k/2) = y^k (1 + (k/2) e + (k/2) (k/2 + 1)/2 e²), to 3e-9 for k ≤ 40.
  template <int kCount>
  void powers(const Scale& scale, VecF* v) const {
    VecF square[kCount], result[kCount];
    for (int r = 0; r < kCount; ++r) {
      const VecF u = (v[r] - scale.origin) * scale.inverse + scale.low;
      const VecF ratio = 1.0f + u, lost = u - (ratio - 1.0f);
      const VecF y = approximate_reciprocal_root(ratio);
      square[r] = y * y;
      const VecF e = (1.0f - ratio * square[r]) - lost * square[r];
      const VecF start = k % 2 == 1 ? y : broadcast(1.0f);
      result[r] = start + start * (e * (e * second_order + single));
    }
    for (int n = k / 2; n > 0;) {
      if (n % 2 == 1) {
        for (int r = 0; r < kCount; ++r) result[r] *= square[r];
      }
      n /= 2;
      if (n == 0) break;
      for (int r = 0; r < kCount; ++r) square[r] *= square[r];
    }
    for (int r = 0; r < kCount; ++r) v[r] = result[r];
  }
};

}  // namespace
}  // namespace pfgm
