// SPDX-License-Identifier: Apache-2.0
// References that are alike: float products and distances of such have equal errors, so that no sum
// averages them out. Equal references are, or all but equal ones (crowds), and so are those of few
// values: a column adds to a partial sum one of a few numbers, and what float rounds off it depends
// on nothing else.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../../field_math.h"
#include "parallel.h"

namespace pfgm {
namespace {

// NaN has no place in an order.
inline double finite_or_zero(double v) { return v - v == 0 ? v : 0; }

// Whether roundings of the distances of two references depend on each other: they do where these
// are so close, and where products of floats y = x0 − origin are summed, if origin is not null,
// also where they are near and have a sixteenth of their y in common. What a column adds to sums of
// about the same size rounds alike, whatever the sums are, unless it adds nothing. norm: the square
// of what is rounded.
inline bool coincide(const FieldParams& p, int64_t a, int64_t b, double norm, double close,
                     const double* origin) {
  constexpr double kNear = 0.1;
  const double near = origin ? kNear : 0, most = std::max(close, near);
  double square = 0;
  int64_t equal = 0;
  for (int64_t c = 0; c < p.dim && square <= most * most * norm; ++c) {
    const double value = decode(p, a * p.dim + c), other = decode(p, b * p.dim + c);
    square += (value - other) * (value - other);
    equal += value == other && origin && value != origin[c];
  }
  return square <= close * close * norm || (square <= near * near * norm && 16 * equal >= p.dim);
}

constexpr int64_t kSampleRows = 1024;

// How many pairs of a sample of the references coincide, or `most`: of neighbours in the order of a
// projection, of which a few columns do.
inline int64_t coinciding_pairs(const FieldParams& p, double close, const double* origin,
                                int64_t most) {
  constexpr int64_t kSampleColumns = 16;
  const int64_t rows = std::min(p.count, kSampleRows), columns = std::min(p.dim, kSampleColumns);
  const auto pick =
      [&](int64_t i) {  // one of the i-th share, at random: an order may have a period
        const int64_t first = p.count * i / rows, share = p.count * (i + 1) / rows - first;
        return first + static_cast<int64_t>((static_cast<uint32_t>(i) * 2654435761u) >> 16) % share;
      };
  std::vector<std::pair<double, int64_t>> sample(rows);
  std::vector<double> column(rows);
  std::vector<double> norms(rows);  // ‖x0 − their mean‖², from the columns
  std::vector<int64_t> picked(rows);
  for (int64_t i = 0; i < rows; ++i) {
    picked[i] = pick(i);
    sample[i].second = i;
  }
  for (int64_t c = 0; c < columns; ++c) {
    double mean = 0;
    for (int64_t i = 0; i < rows; ++i) {
      column[i] = decode(p, picked[i] * p.dim + p.dim * c / columns);
      mean += column[i] / static_cast<double>(rows);
    }
    const double direction = ::fmod(0.618 * static_cast<double>(c + 1), 1.0) + 0.5;
    for (int64_t i = 0; i < rows; ++i) {
      const double centred = column[i] - mean;
      sample[i].first += direction * centred;
      norms[i] += centred * centred * static_cast<double>(p.dim) / static_cast<double>(columns);
    }
  }
  for (auto& [projection, i] : sample) projection = finite_or_zero(projection);
  std::sort(sample.begin(), sample.end());
  int64_t equal = 0;
  for (int64_t i = 1; i < rows && equal < most; ++i) {
    const int64_t a = sample[i - 1].second, b = sample[i].second;
    equal += coincide(p, picked[a], picked[b], norms[a], close, origin);
  }
  return equal;
}

// Whether many references coincide.
inline bool has_crowds(const FieldParams& p, const double* origin) {
  constexpr int64_t kCrowd = 8;
  constexpr double kClose = 1e-3;
  const int64_t equal = coinciding_pairs(p, kClose, origin, kCrowd);
  return equal >= kCrowd || equal * 64 > std::min(p.count, kSampleRows);
}

// Whether there are few values, judged by a sample from all columns: mostly, a part of it does.
inline bool has_few_values(const FieldParams& p) {
  constexpr int64_t kSampleSize = 1024, kFew = 32, kStride = 2654435761;  // a prime
  const int64_t total = p.count * p.dim, size = std::min(total, kSampleSize);
  const auto few = [&](int64_t of) {
    std::vector<double> sample(of);
    for (int64_t i = 0; i < of; ++i) sample[i] = finite_or_zero(decode(p, i * kStride % total));
    std::sort(sample.begin(), sample.end());
    return std::unique(sample.begin(), sample.end()) - sample.begin() <= kFew;
  };
  return few(std::min(size, 4 * kFew)) && few(size);
}

inline bool are_alike(const FieldParams& p, const double* origin) {
  return has_few_values(p) || has_crowds(p, origin);
}

// The same for references that are equal or, mostly, differ by roundings of their values, and for
// no others: of ‖y‖², to a millionth, and two projections of x0, to that share of ‖y‖.
inline uint64_t fingerprint(double square, double first, double second) {
  if (!(square > 0)) return 0;
  uint64_t mixed, half;
  __builtin_memcpy(&mixed, &square, sizeof mixed);
  half = (mixed >> 1) + (uint64_t{1023} << 51);  // about ‖y‖, to a power of two and some more
  half = (half + (uint64_t{33} << 52)) & ~((uint64_t{1} << 51) - 1);  // a multiple of its 2^33
  double coarse;
  __builtin_memcpy(&coarse, &half, sizeof coarse);
  mixed >>= 32;
  for (const double projection : {first, second}) {
    const double rounded = coarse + projection;
    uint64_t share;
    __builtin_memcpy(&share, &rounded, sizeof share);
    mixed = mixed * 0x9e3779b97f4a7c15u + share;
    mixed ^= mixed >> 29;
  }
  return mixed * 0xbf58476d1ce4e5b9u;
}

// How many of the fingerprints are the one that most are.
inline int64_t most_equal(int num_threads, const std::vector<uint64_t>& fingerprints) {
  constexpr int64_t kPart = 1 << 16, kMostParts = 16;  // of which tables stay in the cache
  const auto count = static_cast<int64_t>(fingerprints.size());
  int64_t parts = 1, size = 64;  // powers of two
  while (parts < kMostParts && parts * kPart < count) parts *= 2;
  while (size * parts < 2 * count) size *= 2;
  std::vector<int64_t> most(parts, 1);
  parallel_for(num_threads, parts, [&](int64_t part, int) {
    struct Slot {
      uint32_t high, copies;
    };
    std::vector<Slot> table(size);
    uint32_t found = 1;
    for (const uint64_t mark : fingerprints) {
      const auto high = static_cast<uint32_t>(mark >> 32);
      if ((high & (parts - 1)) != part) continue;
      auto slot = static_cast<int64_t>(mark) & (size - 1);
      while (table[slot].copies > 0 && table[slot].high != high) slot = (slot + 1) & (size - 1);
      table[slot].high = high;
      found = std::max(found, ++table[slot].copies);
    }
    most[part] = found;
  });
  return *std::max_element(most.begin(), most.end());
}

}  // namespace
}  // namespace pfgm
