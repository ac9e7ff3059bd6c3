// SPDX-License-Identifier: Apache-2.0
// Prepares references for the kernels for larger d (operands.h).
#include "operands.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "alike.h"

namespace pfgm {
namespace {

constexpr int64_t kPrepareRows = 64;
constexpr int64_t kSampleSize = 1 << 13;  // values that the grid is guessed from
constexpr int64_t kMeanRows = 64;         // references that the origin is the mean of, about
// Decoding images rounds a few times. Relative to the range: far from zero floats are coarser than
// that, and what they are off the grid by would show in the result.
constexpr double kGridTolerance = 0x1p-22;

// codes ↦ low + step · code, within tolerance. step = 0: no grid. off: by how much a value is at
// most.
struct Grid {
  double low = 0, step = 0, tolerance = 0, off = 0;
};

Grid table_grid(const float* table) {
  Grid grid;
  grid.low = table[0];
  grid.step = (double{table[255]} - table[0]) / 255;
  grid.tolerance = kGridTolerance * std::abs(255 * grid.step);
  for (int u = 0; u < 256; ++u) {
    grid.off = std::max(grid.off, std::abs(table[u] - (grid.low + grid.step * u)));
  }
  if (!(grid.off <= grid.tolerance)) grid.step = 0;
  return grid;
}

// The grid that a sample of the values lies on, with room on both sides for values outside of it.
Grid sample_grid(const FieldParams& p) {
  const float* values = static_cast<const float*>(p.values);
  const int64_t rows = std::max<int64_t>(1, std::min(p.count, kSampleSize / p.dim));
  std::vector<float> sample;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = values + p.count * i / rows * p.dim;
    sample.insert(sample.end(), row, row + std::min(p.dim, kSampleSize));
  }
  Grid grid;
  for (const float v : sample) {
    if (!std::isfinite(v)) return grid;
  }
  std::sort(sample.begin(), sample.end());
  sample.erase(std::unique(sample.begin(), sample.end()), sample.end());
  const double low = sample.front(), range = sample.back() - low;
  if (!(range > 0) || !std::isfinite(range)) return grid;
  grid.tolerance = kGridTolerance * range;
  double step = range;
  for (size_t i = 1; i < sample.size(); ++i) {
    const double gap = double{sample[i]} - sample[i - 1];
    if (gap > 4 * grid.tolerance) step = std::min(step, gap);
  }
  const double steps = std::round(range / step);
  if (steps > 255) return grid;
  step = range / steps;
  for (const float v : sample) {
    grid.off = std::max(grid.off, std::abs(v - (low + step * std::round((v - low) / step))));
  }
  if (!(grid.off <= grid.tolerance)) return grid;
  grid.low = low - std::floor((255 - steps) / 2) * step;
  grid.step = step;
  return grid;
}

double code_norm(const uint8_t* codes, const int32_t* origin, int64_t dim) {
  double sum = 0;
  for (int64_t start = 0; start < dim; start += 4096) {
    int32_t partial = 0;
    for (int64_t c = start; c < std::min(dim, start + 4096); ++c) {
      partial += (codes[c] - origin[c]) * (codes[c] - origin[c]);
    }
    sum += partial;
  }
  return sum;
}

// Codes of one reference; false where a value is not on the grid.
bool encode_row(const float* values, int64_t dim, const Grid& grid, uint8_t* codes) {
  const float low = static_cast<float>(grid.low), step = static_cast<float>(grid.step);
  const float inverse = 1 / step, tolerance = static_cast<float>(2 * grid.tolerance);
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  constexpr int kSpan = 64;              // values of one vectorised loop
  bool fits = true;
  for (int64_t start = 0; start < dim; start += kSpan) {
    const int span = clamp_size(dim - start, kSpan);
    const float* from = values + start;
    int outside = 0;
    for (int i = 0; i < span; ++i) {
      const float code = ((from[i] - low) * inverse + kMagic) - kMagic;
      const float off = std::abs(from[i] - (low + step * code));
      outside |= !(off <= tolerance) | (code < 0) | (code > 255);
      codes[start + i] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
    fits &= !outside;
  }
  return fits;
}

template <class Row>
void for_rows(const FieldParams& p, const Row& row) {
  parallel_for(p.num_threads, (p.count + kPrepareRows - 1) / kPrepareRows, [&](int64_t task, int) {
    const int64_t first = task * kPrepareRows;
    for (int64_t j = first; j < std::min(p.count, first + kPrepareRows); ++j) row(j);
  });
}

// The middle of a sample of the references, to a few digits of its distance from them: float then
// holds what is left of most values when it is subtracted.
void sample_mean(const FieldParams& p, double* mean) {
  const int64_t rows = std::min(p.count, kMeanRows);
  std::vector<double> low(p.dim, INFINITY), high(p.dim, -INFINITY);
  std::fill(mean, mean + p.dim, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t start = p.count * i / rows * p.dim;
    for (int64_t c = 0; c < p.dim; ++c) {
      const double value = decode(p, start + c);
      mean[c] += value;
      low[c] = std::min(low[c], value);
      high[c] = std::max(high[c], value);
    }
  }
  for (int64_t c = 0; c < p.dim; ++c) {
    mean[c] = static_cast<float>(mean[c] / static_cast<double>(rows));
    const double width = high[c] - low[c];
    if (!(width > 0) || !std::isfinite(width)) continue;
    const double step = std::exp2(std::floor(std::log2(width / 8)));
    mean[c] = static_cast<float>(step * std::nearbyint(mean[c] / step));
  }
}

// The grid (operands.h) with its origin moved to the next code. Returns the codes of that.
std::vector<int32_t> write_grid(const FieldParams& p, const Grid& grid) {
  p.grid[0] = grid.step;
  p.grid[1] = std::sqrt(static_cast<double>(p.dim)) * 2 * grid.tolerance / std::abs(grid.step);
  p.grid[2] = grid.off > 0;
  p.grid[3] = grid.low;
  double* origin = p.grid + kGridHeader;
  std::vector<int32_t> origin_codes(p.dim);
  for (int64_t c = 0; c < p.dim; ++c) {
    const double code = std::clamp((origin[c] - grid.low) / grid.step, 0.0, 255.0);
    origin_codes[c] = static_cast<int32_t>(std::lrint(code));
    origin[c] = grid.low + grid.step * origin_codes[c];
  }
  return origin_codes;
}

// Moves the origin by what the values of a sample are off the grid by, column by column: where
// these are few, that is the same for most references, and far from a query it adds up.
void centre_rounding(const FieldParams& p, const Grid& grid, const uint8_t* codes) {
  const int64_t rows = std::min(p.count, kMeanRows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t start = p.count * i / rows * p.dim;
    for (int64_t c = 0; c < p.dim; ++c) {
      const double off = decode(p, start + c) - (grid.low + grid.step * codes[start + c]);
      p.grid[kGridHeader + c] += off / static_cast<double>(rows);
    }
  }
}

// Codes and norms; false where the values are not on the grid.
bool encode(const FieldParams& p, const Grid& grid) {
  if (grid.step == 0) return false;
  const bool encoded = p.value_type == ValueType::kUint8;
  if (!encoded) use_huge_pages(p.codes, p.count * p.dim);
  const uint8_t* codes = encoded ? static_cast<const uint8_t*>(p.values) : p.codes;
  const std::vector<int32_t> origin = write_grid(p, grid);
  std::atomic<bool> fits{true};
  for_rows(p, [&](int64_t j) {
    if (!fits.load(std::memory_order_relaxed)) return;
    const int64_t start = j * p.dim;
    const float* values = static_cast<const float*>(p.values) + start;
    if (!encoded && !encode_row(values, p.dim, grid, p.codes + start)) fits = false;
    p.norms[j] = code_norm(codes + start, origin.data(), p.dim);
  });
  if (fits) centre_rounding(p, grid, codes);
  return fits;
}

// Codes, norms and all of the grid; what it says of references that are alike, as if they were.
void encode_or_centre(const FieldParams& p) {
  double* origin = p.grid + kGridHeader;
  sample_mean(p, origin);
  const std::vector<double> mean(origin, origin + p.dim);
  if (p.value_type == ValueType::kUint8) {
    if (encode(p, table_grid(p.table))) return;
  } else if (p.codes) {
    if (encode(p, sample_grid(p))) return;
  }
  std::copy(mean.begin(), mean.end(), origin);
  p.grid[0] = 1;
  p.grid[1] = -1;
  p.grid[2] = 1;
  for_rows(p, [&](int64_t j) {
    double sum = 0;
    for (int64_t c = 0; c < p.dim; ++c) {
      const double y = static_cast<float>(decode(p, j * p.dim + c) - origin[c]);
      sum += y * y;
    }
    p.norms[j] = sum - sum == 0 ? sum : NAN;
  });
}

}  // namespace

void PFGM_ISA::prepare_references(const FieldParams& p) {
  encode_or_centre(p);
  p.grid[2] = are_alike(p) ? 1 + p.grid[2] : 0;
}

}  // namespace pfgm
