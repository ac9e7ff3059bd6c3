// SPDX-License-Identifier: Apache-2.0
// References as the kernels for larger d read them: y = (x0 − origin) / unit.
//
// The origin is a point amid the data: products of y are no larger than the data are wide, however
// far from zero they lie, and a column in which most values are the same adds up no roundings,
// which would be the same, too. Where the values lie on a grid of at most 256 steps (8-bit images,
// also stored as floats), unit is the step, the origin is on the grid, and y = code − origin's code
// is a small exact integer. Else unit is 1. With x' = (x − origin)/unit,
//
//   s_j / unit² = ‖x'‖² + t²/unit² + ‖y_j‖² − 2 x'·y_j
#pragma once

#include "../../field_math.h"
#include "kernels.h"
#include "simd.h"

namespace pfgm {
namespace {

struct Operands {
  const double* norms;   // (N,) ‖y‖², NaN where a reference is not finite
  const uint8_t* codes;  // (N, d), or null where the values are not on a grid
  double unit, inverse_unit;
  double deviation;              // ‖x0 − (origin + unit · y)‖ / unit at most, where there are codes
  Buffer<double> origin;         // (ld,) with zeros beyond d, as rows of queries are
  Buffer<int32_t> origin_codes;  // (ld,), where there are codes
  bool alike;                    // whether rounding errors of float products are (alike.h)
  double copies;                 // how many are copies of one at most, where d ≤ 256 and no codes
  double radius;                 // max ‖y‖, NaN where any reference is not finite
  Buffer<double> roots;          // (N,) ‖y‖
};

// FieldParams' grid: unit, deviation (negative: there are no codes), how many references are copies
// of one (infinity: all are alike), what code 0 stands for, origin (d,).
constexpr int64_t kGridHeader = 4;

// Whether the references are codes on a grid, as prepare_references found.
inline bool has_codes(const FieldParams& p) { return p.grid[1] >= 0; }

// Whether the fused kernels read references that were prepared.
inline bool in_fused(const FieldParams& p) {
  return p.dim > PFGM_ISA::kMaxDirectDim && p.dim <= PFGM_ISA::kMaxFusedDim && !has_codes(p);
}

// What prepare_references wrote.
inline Operands make_operands(const FieldParams& p) {
  Operands o{};
  const bool coded = has_codes(p);
  o.norms = p.norms;
  o.codes = !coded ? nullptr : p.codes ? p.codes : static_cast<const uint8_t*>(p.values);
  o.unit = p.grid[0];
  o.inverse_unit = 1 / o.unit;
  o.deviation = coded ? p.grid[1] : 0;
  o.copies = p.grid[2];
  o.alike = o.copies == INFINITY;
  const int64_t ld = round_up(p.dim, kPad);
  const double* origin = p.grid + kGridHeader;
  o.origin = Buffer<double>(ld);
  o.origin_codes = Buffer<int32_t>(coded ? ld : 0);
  for (int64_t c = 0; c < ld; ++c) {
    o.origin[c] = c < p.dim ? origin[c] : 0;
    if (!coded) continue;
    const double code = c < p.dim ? (origin[c] - p.grid[3]) / o.unit : 0;
    o.origin_codes[c] = static_cast<int32_t>(std::lrint(code));
  }
  o.roots = Buffer<double>(p.count);
  for (int64_t j = 0; j < p.count; ++j) {
    o.roots[j] = ::sqrt(o.norms[j]);
    if (!(o.roots[j] <= o.radius)) o.radius = o.roots[j];
    if (o.radius != o.radius) break;
  }
  return o;
}

// Fetches bytes that are needed soon into the second-level cache; they need not be valid memory.
inline void prefetch(const void* address, int64_t bytes) {
  const char* first = static_cast<const char*>(address);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
  __builtin_prefetch(first + bytes - 1, 0, 2);
}

// Rows of `columns` columns of y as floats, ld apart. The same block `ahead` elements further on is
// read next: rows are too far apart for the hardware to see.
inline void decode_block(const FieldParams& p, const Operands& operands, int64_t first,
                         int64_t rows, int64_t column, int64_t columns, float* out, int64_t ld,
                         int64_t ahead) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t start = (first + r) * p.dim + column;
    float* __restrict row = out + r * ld;
    if (operands.codes) {
      const uint8_t* codes = operands.codes + start;
      const int32_t* origin = operands.origin_codes.get() + column;
      prefetch(codes + ahead, columns);
      int64_t c = 0;
      for (; c + kFloatLanes <= columns; c += kFloatLanes) {
        store(row + c, __builtin_convertvector(widen_codes(codes + c) - load(origin + c), VecF));
      }
      for (; c < columns; ++c) row[c] = static_cast<float>(codes[c] - origin[c]);
    } else if (p.value_type == ValueType::kUint8) {
      const uint8_t* codes = static_cast<const uint8_t*>(p.values) + start;
      prefetch(codes + ahead, columns);
      for (int64_t c = 0; c < columns; ++c) {
        row[c] = static_cast<float>(p.table[codes[c]] - operands.origin[column + c]);
      }
    } else {
      const float* values = static_cast<const float*>(p.values) + start;
      prefetch(values + ahead, columns * 4);
      for (int64_t c = 0; c < columns; ++c) {
        row[c] = static_cast<float>(values[c] - operands.origin[column + c]);
      }
    }
  }
}

}  // namespace
}  // namespace pfgm
