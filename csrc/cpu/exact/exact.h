// SPDX-License-Identifier: Apache-2.0
// The road of every case: direct differences in double, for float64 input, for gradients of the
// references, and for each query that a road in float could not certify. One pass over blocks of
// references, decoded to double in a thread's scratch memory, in two layouts that forward.cpp and
// backward.cpp are written over:
//
//   ColumnBlock  [d][rows]  small d: vectors run over references
//   RowBlock     [rows][ld] larger d: vectors run over columns, tiles of 4 queries × 4 references
//
// Per block and group of kGroup queries:
//
//   distances    out[q][r] = Σ_c (row_r[c] − x_q[c])²
//   projections  out[q][r] = Σ_c g_q[c] (row_r[c] − x_q[c])
//   gather       sums[c] += Σ_r coefficients[r] (row_r[c] − x[c])
//   scatter      grad_r[c] += weights[r] g[c] + 2 coefficients[r] (x[c] − row_r[c])
#pragma once

#include "../../field_math.h"
#include "../common/shares.h"
#include "../common/simd.h"

namespace pfgm {
namespace {

constexpr int kGroup = 4;
constexpr int kMaxRows = 512;                // references in a block
constexpr int64_t kBlockElements = 1 << 16;  // of a RowBlock: 512 KiB, half of a usual L2 cache
constexpr int64_t kMaxColumnDim = 32;
constexpr int64_t kTile = 64;  // queries that share a decoded block of references

// Weights below exp(−kCutoff)/N of the nearest's cannot be seen in a float64 sum.
constexpr double kCutoff = 38;

typedef const double* const (&Group)[kGroup];
typedef double (&GroupMatrix)[kGroup][kMaxRows];

inline void encode_gradient(const FieldParams& p, int64_t index, double value) {
  if (p.value_type == ValueType::kFloat32) {
    static_cast<float*>(p.dvalues)[index] = static_cast<float>(value);
  } else {
    static_cast<double*>(p.dvalues)[index] = value;
  }
}

struct ColumnBlock {
  static int64_t rows(int64_t dim) { return dim <= 16 ? kMaxRows : kMaxRows / 2; }
  static int64_t size(int64_t dim) { return rows(dim) * dim; }

  double* data;
  double* grad;
  int64_t stride, dim;
  int count, padded;  // references in the block, rounded up to whole vectors

  ColumnBlock(double* scratch, int64_t dim)
      : data(scratch), grad(scratch + size(dim)), stride(rows(dim)), dim(dim) {}

  void load(const FieldParams& p, int64_t first, int n) {
    count = n;
    padded = static_cast<int>(round_up(n, kLanes));
    for (int64_t c = 0; c < dim; ++c) {
      double* column = data + c * stride;
      for (int r = 0; r < n; ++r) column[r] = decode(p, (first + r) * dim + c);
      for (int r = n; r < padded; ++r) column[r] = column[0];
    }
  }

  void distances(Group x, GroupMatrix out) const {
    for (int r = 0; r < padded; r += kLanes) {
      Vec sums[kGroup] = {};
      for (int64_t c = 0; c < dim; ++c) {
        const Vec row = pfgm::load(data + c * stride + r);
        for (int q = 0; q < kGroup; ++q) {
          const Vec difference = row - x[q][c];
          sums[q] += difference * difference;
        }
      }
      for (int q = 0; q < kGroup; ++q) store(out[q] + r, sums[q]);
    }
  }

  void projections(Group x, Group g, GroupMatrix out) const {
    for (int r = 0; r < padded; r += kLanes) {
      Vec sums[kGroup] = {};
      for (int64_t c = 0; c < dim; ++c) {
        const Vec row = pfgm::load(data + c * stride + r);
        for (int q = 0; q < kGroup; ++q) sums[q] += (row - x[q][c]) * g[q][c];
      }
      for (int q = 0; q < kGroup; ++q) store(out[q] + r, sums[q]);
    }
  }

  void gather(const double* x, const double* coefficients, double* sums) const {
    for (int64_t c = 0; c < dim; ++c) {
      Vec sum = {};
      for (int r = 0; r < padded; r += kLanes) {
        sum += pfgm::load(coefficients + r) * (pfgm::load(data + c * stride + r) - x[c]);
      }
      sums[c] += reduce_add(sum);
    }
  }

  void clear_gradient() {
    for (int64_t i = 0; i < size(dim); ++i) grad[i] = 0;
  }

  void scatter(const double* x, const double* g, const double* weights,
               const double* coefficients) {
    for (int64_t c = 0; c < dim; ++c) {
      for (int r = 0; r < padded; r += kLanes) {
        double* out = grad + c * stride + r;
        const Vec difference = x[c] - pfgm::load(data + c * stride + r);
        store(out, pfgm::load(out) + pfgm::load(weights + r) * g[c] +
                       2.0 * pfgm::load(coefficients + r) * difference);
      }
    }
  }

  void store_gradient(const FieldParams& p, int64_t first) const {
    for (int r = 0; r < count; ++r) {
      for (int64_t c = 0; c < dim; ++c)
        encode_gradient(p, (first + r) * dim + c, grad[c * stride + r]);
    }
  }
};

struct RowBlock {
  static int64_t rows(int64_t dim) {
    const int64_t fit = kBlockElements / round_up(dim, kPad) / kPad * kPad;
    return fit < kPad ? kPad : fit > kMaxRows / 8 ? kMaxRows / 8 : fit;
  }
  static int64_t size(int64_t dim) { return rows(dim) * round_up(dim, kPad); }

  double* data;
  double* grad;
  int64_t dim, ld;
  int count, padded;  // references in the block, rounded up to whole vectors and tiles

  RowBlock(double* scratch, int64_t dim)
      : data(scratch), grad(scratch + size(dim)), dim(dim), ld(round_up(dim, kPad)) {}

  void load(const FieldParams& p, int64_t first, int n) {
    count = n;
    padded = static_cast<int>(round_up(n, kPad));
    for (int r = 0; r < padded; ++r) {
      // Rows beyond the last reference repeat it; the drivers ignore them.
      const int64_t start = (first + (r < n ? r : n - 1)) * dim;
      double* row = data + r * ld;
      decode_row(p, start, row);
      for (int64_t c = dim; c < ld; ++c) row[c] = 0;
    }
  }

  void distances(Group x, GroupMatrix out) const {
    for (int r = 0; r < padded; r += kGroup) {
      Vec sums[kGroup][kGroup] = {};
      for (int64_t c = 0; c < ld; c += kLanes) {
        Vec row[kGroup];
        for (int i = 0; i < kGroup; ++i) row[i] = pfgm::load(data + (r + i) * ld + c);
        for (int q = 0; q < kGroup; ++q) {
          const Vec query = pfgm::load(x[q] + c);
          for (int i = 0; i < kGroup; ++i) {
            const Vec difference = row[i] - query;
            sums[q][i] += difference * difference;
          }
        }
      }
      for (int q = 0; q < kGroup; ++q) {
        for (int i = 0; i < kGroup; ++i) out[q][r + i] = reduce_add(sums[q][i]);
      }
    }
  }

  void projections(Group x, Group g, GroupMatrix out) const {
    for (int r = 0; r < padded; r += kGroup) {
      Vec sums[kGroup][kGroup] = {};
      for (int64_t c = 0; c < ld; c += kLanes) {
        for (int q = 0; q < kGroup; ++q) {
          const Vec query = pfgm::load(x[q] + c), cotangent = pfgm::load(g[q] + c);
          for (int i = 0; i < kGroup; ++i) {
            sums[q][i] += cotangent * (pfgm::load(data + (r + i) * ld + c) - query);
          }
        }
      }
      for (int q = 0; q < kGroup; ++q) {
        for (int i = 0; i < kGroup; ++i) out[q][r + i] = reduce_add(sums[q][i]);
      }
    }
  }

  void gather(const double* x, const double* coefficients, double* sums) const {
    int active[kMaxRows], n = 0;
    for (int r = 0; r < count; ++r) {
      if (!(coefficients[r] == 0)) active[n++] = r;
    }
    constexpr int kStrip = 4 * kLanes;
    int64_t c = 0;
    for (; n > 0 && c + kStrip <= ld; c += kStrip)
      gather_strip<4>(x, coefficients, active, n, c, sums);
    for (; n > 0 && c < ld; c += kLanes) gather_strip<1>(x, coefficients, active, n, c, sums);
  }

  void clear_gradient() {
    for (int64_t i = 0; i < size(dim); ++i) grad[i] = 0;
  }

  void scatter(const double* x, const double* g, const double* weights,
               const double* coefficients) {
    for (int r = 0; r < count; ++r) {
      if (weights[r] == 0) continue;
      double* out = grad + r * ld;
      const double* row = data + r * ld;
      for (int64_t c = 0; c < ld; c += kLanes) {
        const Vec difference = pfgm::load(x + c) - pfgm::load(row + c);
        store(out + c, pfgm::load(out + c) + weights[r] * pfgm::load(g + c) +
                           2.0 * coefficients[r] * difference);
      }
    }
  }

  void store_gradient(const FieldParams& p, int64_t first) const {
    for (int r = 0; r < count; ++r) {
      for (int64_t c = 0; c < dim; ++c) encode_gradient(p, (first + r) * dim + c, grad[r * ld + c]);
    }
  }

 private:
  void decode_row(const FieldParams& p, int64_t start, double* row) const {
    if (p.value_type == ValueType::kFloat32) {
      const float* values = static_cast<const float*>(p.values) + start;
      for (int64_t c = 0; c < dim; ++c) row[c] = values[c];
    } else {
      for (int64_t c = 0; c < dim; ++c) row[c] = decode(p, start + c);
    }
  }

  template <int kVectors>
  void gather_strip(const double* x, const double* coefficients, const int* active, int n,
                    int64_t c, double* sums) const {
    Vec query[kVectors], sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      query[v] = pfgm::load(x + c + v * kLanes);
      sum[v] = Vec{};
    }
    for (int i = 0; i < n; ++i) {
      const double* row = data + active[i] * ld + c;
      for (int v = 0; v < kVectors; ++v) {
        sum[v] += coefficients[active[i]] * (pfgm::load(row + v * kLanes) - query[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v)
      store(sums + c + v * kLanes, pfgm::load(sums + c + v * kLanes) + sum[v]);
  }
};

inline Shares exact_shares(const FieldParams& p, int64_t num_rows) {
  const auto size = [&](int64_t tile) {
    return round_up(clamp_size(num_rows - tile * kTile, kTile), kGroup);
  };
  return {p.num_threads, (num_rows + kTile - 1) / kTile, size, p.count, kMaxRows};
}

// Doubles that a block of references takes.
inline int64_t block_size(int64_t dim) {
  return dim <= kMaxColumnDim ? ColumnBlock::size(dim) : RowBlock::size(dim);
}

}  // namespace
}  // namespace pfgm
