// SPDX-License-Identifier: Apache-2.0
// Prepares references for the kernels for larger d (operands.h).
#include "operands.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "alike.h"
#include "sparse.h"

namespace pfgm {
namespace {

constexpr int64_t kPrepareRows = 64;
constexpr int64_t kSampleSize = 1 << 13;  // values that the grid is guessed from
constexpr int64_t kMeanRows = 64;         // references that the origin is the mean of, about
// Decoding images rounds a few times. Relative to the range: far from zero floats are coarser than
// that, and what they are off the grid by would show in the result.
constexpr double kGridTolerance = 0x1p-22;

// codes ↦ low + step · code, within tolerance. step = 0: no grid.
struct Grid {
  double low = 0, step = 0, tolerance = 0;
};

Grid table_grid(const float* table) {
  Grid grid;
  grid.low = table[0];
  grid.step = (double{table[255]} - table[0]) / 255;
  grid.tolerance = kGridTolerance * std::abs(255 * grid.step);
  double off = 0;
  for (int u = 0; u < 256; ++u) {
    off = std::max(off, std::abs(table[u] - (grid.low + grid.step * u)));
  }
  if (!(off <= grid.tolerance)) grid.step = 0;
  return grid;
}

// Values from all over the references, in runs at random places: an order may have a period.
std::vector<float> sample_values(const FieldParams& p) {
  const float* values = static_cast<const float*>(p.values);
  const int64_t total = p.count * p.dim;
  if (total <= kSampleSize) return {values, values + total};
  constexpr int64_t kRun = 64, kRuns = kSampleSize / kRun;
  std::vector<float> sample;
  for (int64_t i = 0; i < kRuns; ++i) {
    const int64_t first = total * i / kRuns, share = total * (i + 1) / kRuns - first;
    const int64_t place = static_cast<uint32_t>(i) * 2654435761u % (share - kRun + 1);
    sample.insert(sample.end(), values + first + place, values + first + place + kRun);
  }
  return sample;
}

// The smallest gap among some values, which get sorted, of those that no rounding makes; else
// `most`.
double smallest_gap(std::vector<float>& values, double tolerance, double most) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  for (size_t i = 1; i < values.size(); ++i) {
    const double gap = double{values[i]} - values[i - 1];
    if (gap > 4 * tolerance) most = std::min(most, gap);
  }
  return most;
}

// The grid that a sample lies on, of values from low to high.
Grid sample_grid(std::vector<float> sample, double low, double high) {
  const double range = high - low;
  Grid grid;
  if (!(range > 0) || !std::isfinite(range)) return grid;
  grid.tolerance = kGridTolerance * range;
  std::vector<float> few;  // which mostly do to see that there is no grid
  for (size_t i = 0; i < sample.size(); i += 16) few.push_back(sample[i]);
  if (std::round(range / smallest_gap(few, grid.tolerance, range)) > 255) return grid;
  const double steps = std::round(range / smallest_gap(sample, grid.tolerance, range));
  if (steps > 255) return grid;
  const double step = range / steps;
  double off = 0;
  for (const float v : sample) {
    off = std::max(off, std::abs(v - (low + step * std::round((v - low) / step))));
  }
  if (!(off <= grid.tolerance)) return grid;
  grid.low = low;
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

// The least and the largest of some values; NaN are none.
struct Range {
  float low = INFINITY, high = -INFINITY;

  void add(const float* values, int64_t count) {
    VecF least = broadcast(low), most = broadcast(high);
    int64_t i = 0;
    for (; i + kFloatLanes <= count; i += kFloatLanes) {
      least = smaller(load(values + i), least);
      most = larger(load(values + i), most);
    }
    for (int lane = 0; lane < kFloatLanes; ++lane) add(least[lane], most[lane]);
    for (; i < count; ++i) add(values[i], values[i]);
  }
  void add(float least, float most) {
    low = least < low ? least : low;
    high = most > high ? most : high;
  }
};

// Calls task(first, last) for runs of references.
template <class Task>
void for_runs(const FieldParams& p, const Task& task) {
  const int64_t runs = (p.count + kPrepareRows - 1) / kPrepareRows;
  parallel_for(p.num_threads, runs, [&](int64_t run, int) {
    task(run * kPrepareRows, std::min(p.count, (run + 1) * kPrepareRows));
  });
}

Range all_values(const FieldParams& p) {
  const float* values = static_cast<const float*>(p.values);
  std::vector<Range> ranges((p.count + kPrepareRows - 1) / kPrepareRows);
  for_runs(p, [&](int64_t first, int64_t last) {
    ranges[first / kPrepareRows].add(values + first * p.dim, (last - first) * p.dim);
  });
  Range all;
  for (const Range& range : ranges) all.add(range.low, range.high);
  return all;
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

// The grid (operands.h), its origin the point of it next to the mean. Returns the codes of that.
std::vector<int32_t> write_grid(const FieldParams& p, const Grid& grid, const double* mean) {
  p.grid[0] = grid.step;
  p.grid[1] = std::sqrt(static_cast<double>(p.dim)) * 2 * grid.tolerance / std::abs(grid.step);
  p.grid[3] = grid.low;
  double* origin = p.grid + kGridHeader;
  std::vector<int32_t> origin_codes(p.dim);
  for (int64_t c = 0; c < p.dim; ++c) {
    const double code = std::clamp((mean[c] - grid.low) / grid.step, 0.0, 255.0);
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
bool encode(const FieldParams& p, const Grid& grid, const double* mean) {
  if (grid.step == 0) return false;
  const bool encoded = p.value_type == ValueType::kUint8;
  if (!encoded) use_huge_pages(p.codes, p.count * p.dim);
  const uint8_t* codes = encoded ? static_cast<const uint8_t*>(p.values) : p.codes;
  const std::vector<int32_t> origin = write_grid(p, grid, mean);
  std::atomic<bool> fits{true};
  for_runs(p, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (!fits.load(std::memory_order_relaxed)) return;
      const int64_t start = j * p.dim;
      const float* values = static_cast<const float*>(p.values) + start;
      if (!encoded && !encode_row(values, p.dim, grid, p.codes + start)) fits = false;
      p.norms[j] = code_norm(codes + start, origin.data(), p.dim);
    }
  });
  if (fits) centre_rounding(p, grid, codes);
  return fits;
}

// The same of floats, by a grid that a sample of them lies on. Their range is looked up only where
// that of the sample leaves out some.
bool encode_floats(const FieldParams& p, const double* mean) {
  const std::vector<float> sample = sample_values(p);
  Range range;
  for (const float v : sample) {
    if (!std::isfinite(v)) return false;
    range.add(v, v);
  }
  const Grid grid = sample_grid(sample, range.low, range.high);
  if (grid.step == 0 || encode(p, grid, mean)) return grid.step != 0;
  const Range all = all_values(p);
  if (all.low == range.low && all.high == range.high) return false;
  return encode(p, sample_grid(sample, all.low, all.high), mean);
}

// ‖y‖² of a reference that has no codes, NaN where it is not finite.
template <Source kSource>
double float_norm(const Row<kSource> row, const double* origin, int64_t dim) {
  constexpr int kChains = 4;  // sums in flight
  Vec sums[kChains] = {};
  const auto add = [&](int64_t c, int chain) {
    const Vec y = round_to_float(row.read(c) - load(origin + c));
    sums[chain] += y * y;
  };
  int64_t c = 0;
  for (; c + kChains * kLanes <= dim; c += kChains * kLanes) {
    for (int i = 0; i < kChains; ++i) add(c + i * kLanes, i);
  }
  for (; c + kLanes <= dim; c += kLanes) add(c, 0);
  double sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < dim; ++c) {
    const double y = static_cast<float>(row.read_one(c) - origin[c]);
    sum += y * y;
  }
  return sum - sum == 0 ? sum : NAN;
}

// Numbers that a row is projected with, and for its last kLanes columns those of them that are left
// when it is read kLanes at a time.
std::vector<double> make_direction(int64_t dim) {
  std::vector<double> direction(dim + kLanes);
  for (int64_t c = 0; c < dim; ++c) {
    direction[c] = ::fmod(0.618034 * static_cast<double>(c + 1), 1.0) - 0.5;
    if (c >= dim / kLanes * kLanes) direction[c + kLanes] = direction[c];
  }
  return direction;
}

// That of a reference of a given ‖y‖².
template <Source kSource>
uint64_t fingerprint(const Row<kSource> row, double square, const double* direction, int64_t dim) {
  Vec first = {}, second = row.read(dim - kLanes) * load(direction + dim);
  int64_t c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    first += row.read(c) * load(direction + c);
    second += row.read(c + kLanes) * load(direction + c + kLanes);
  }
  if (c + kLanes <= dim) first += row.read(c) * load(direction + c);
  return fingerprint(square, reduce_add(first), reduce_add(second));
}

// Norms and all of the grid but how many references are alike, where there are no codes. Returns
// how many are copies of one at most, to the kernels that have to know.
int64_t centre(const FieldParams& p, const std::vector<double>& mean) {
  std::copy(mean.begin(), mean.end(), p.grid + kGridHeader);
  p.grid[0] = 1;
  p.grid[1] = -1;
  const bool fused = in_fused(p);
  std::vector<uint64_t> fingerprints(fused ? p.count : 0);
  const std::vector<double> direction = make_direction(p.dim);
  const RowReader reader(p);
  for_runs(p, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      with_row(reader, j, [&](const auto& row) {
        p.norms[j] = float_norm(row, mean.data(), p.dim);
        if (fused) fingerprints[j] = fingerprint(row, p.norms[j], direction.data(), p.dim);
      });
    }
  });
  return fused ? most_equal(p.num_threads, fingerprints) : 1;
}

// Codes, norms and all of the grid but how many references are alike; false where there is no grid.
bool write_codes(const FieldParams& p, const std::vector<double>& mean) {
  if (p.value_type == ValueType::kUint8) return encode(p, table_grid(p.table), mean.data());
  return p.codes && encode_floats(p, mean.data());
}

}  // namespace

void PFGM_ISA::prepare_references(const FieldParams& p) {
  std::vector<double> mean(p.dim);
  sample_mean(p, mean.data());
  const int64_t copies = write_codes(p, mean) ? 1 : centre(p, mean);
  const double* origin = in_fused(p) ? p.grid + kGridHeader : nullptr;
  p.grid[2] = are_alike(p, origin) ? INFINITY : static_cast<double>(copies);
}

}  // namespace pfgm
