// SPDX-License-Identifier: Apache-2.0
// What the fused kernels for 32 < d ≤ 256 share: one pass over the references in blocks that stay
// in the cache, with nothing of size B · N in memory. A product
//
//   r_j = (‖y_j‖² − centre) − 2 x'·y_j,   s_j / unit² = r_j + offset
//
// becomes weights where it lies, and a second product of the same block sums the references with
// them. ‖y_j‖² is one more column of the references and of the queries, whose other columns are −2
// x'.
#pragma once

#include "screen.h"
#include "sparse.h"

namespace pfgm {
namespace {

constexpr int64_t kFusedRows = 240;  // references in a block, a multiple of kProductRows
constexpr int64_t kGatherStep = 80;  // references whose weights stay in the first-level cache
constexpr int64_t kFusedDepth = 64;  // columns whose products are summed in one go, about
constexpr int kTasksPerThread = 4;   // at least, as far as the references can be shared out
constexpr int64_t kMinPart = 4 * kFusedRows;

// A bit for each lane whose mask is set.
inline unsigned float_bits(VecFInt mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#else
  unsigned result = 0;
  for (int i = 0; i < kFloatLanes; ++i) result |= (mask[i] & 1u) << i;
  return result;
#endif
}

// The middle of ‖y‖²: what is left of the norms is rounded to float.
inline double norm_centre(const FieldParams& p, const Operands& o) {
  const double middle = (o.norms[0] + o.norms[p.count / 2] + o.norms[p.count - 1]) / 3;
  return std::nearbyint(middle);
}

// Tiles of queries times contiguous parts of the references. There are parts only where there are
// too few tiles for the threads.
struct Parts {
  int64_t count, rows;  // rows: of each part but the last

  Parts(const FieldParams& p, int64_t tiles) {
    const int64_t most = (p.count + kMinPart - 1) / kMinPart;
    const int64_t wanted = tiles < 2 * p.num_threads ? kTasksPerThread * p.num_threads / tiles : 1;
    rows = round_up((p.count + std::min(wanted, most) - 1) / std::min(wanted, most), kFusedRows);
    count = (p.count + rows - 1) / rows;
  }
};

// A block of references as floats, (rows, dim + 1), the last column being ‖y‖² − centre.
struct FusedBlock {
  float* y;
  const float* origin;  // (dim,)
  int64_t dim, rows = 0;

  static int64_t size(int64_t dim) { return kFusedRows * (dim + 1); }

  void load(const FieldParams& p, const Operands& o, double centre, int64_t first, int64_t count) {
    rows = count;
    if (o.codes || p.value_type == ValueType::kUint8) {
      decode_block(p, o, first, rows, 0, dim, y, dim + 1);
    } else {
      subtract_origin(static_cast<const float*>(p.values) + first * dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      y[r * (dim + 1) + dim] = static_cast<float>(o.norms[first + r] - centre);
    }
  }

  // What decode_block does with floats, whose origin is a float: the rounded difference is the
  // same.
  void subtract_origin(const float* values) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* __restrict row = y + r * (dim + 1);
      for (int64_t c = 0; c < dim; ++c) row[c] = values[r * dim + c] - origin[c];
    }
  }

  // out (rows, width) = the first `depth` columns times packed (depth, width), in a few sums from
  // zero.
  void multiply(const float* packed, int64_t depth, int64_t width, float* out) const {
    const int64_t sums = std::max<int64_t>(1, (depth + kFusedDepth / 2) / kFusedDepth);
    const int64_t step = (depth + sums - 1) / sums;
    for (int64_t c = 0; c < depth; c += step) {
      product<FloatProduct>(y + c, rows, dim + 1, 1, packed + c * width, width,
                            std::min(step, depth - c), out, c > 0);
    }
  }

  // out (dim, width) = Σ_r y_r weights_r of weights (rows, width).
  void gather(const float* weights, int64_t width, float* out) const {
    for (int64_t r = 0; r < rows; r += kGatherStep) {
      product<FloatProduct>(y + r * (dim + 1), dim, 1, dim + 1, weights + r * width, width,
                            std::min(kGatherStep, rows - r), out, r > 0);
    }
  }
};

// Packs −2 x' and ones below, (dim + 1, width).
inline void pack_queries(const FieldParams& p, const Operands& o, const Tiles& tiles, int64_t tile,
                         float* packed, double* residuals) {
  const int64_t width = tiles.width(tile);
  pack_floats(
      tiles, tile, p.dim, [&](int64_t b, int64_t c) { return -2 * shifted(p, o, b, c); }, packed,
      residuals);
  for (int64_t q = 0; q < width; ++q) packed[p.dim * width + q] = 1;
}

// log1p and exp as in simd.h, less the care for what cannot occur here: 0 ≤ u ≤ kMostU, and
// logits of which those that count are in [−87, 0].
constexpr float kMostU = 1e30f;

inline VecF plain_log1p(VecF u) {
  const VecF w = 1.0f + u;
  const VecF lost = u - (w - 1.0f);
  const VecFInt bits = (VecFInt)w;
  const VecFInt high = (bits - 0x3f3504f3) & ~0x7fffff;  // exponent << 23
  const VecF m = (VecF)(bits - high);
  const VecF unit = (VecF)(0x3f800000 - high);
  const VecF f = (m - 1.0f) + lost * unit;
  const VecF e = __builtin_convertvector(high, VecF);  // 2^23 times the exponent
  constexpr float kLog[] = {0.33333331197f, -0.25000837961f, 0.20001292692f, -0.16622764905f,
                            0.14199695852f, -0.13164186427f, 0.12779113629f, -0.07646101489f};
  VecF series = broadcast(kLog[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; --i) series = series * f + kLog[i];
  const VecF tail = (f * f) * (f * series - 0.5f) + e * (-2.12194440e-4f * 0x1p-23f);
  return e * (0.693359375f * 0x1p-23f) + (f + tail);
}

inline VecF plain_exp(VecF v) {
  constexpr float kMagic = 12582912.0f;
  const VecF shifted = v * 1.44269504f + kMagic;
  const VecF n = shifted - kMagic;
  const VecF r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  constexpr float kExp[] = {0.49999993440f, 0.16666520522f, 0.04166838934f, 0.00836873020f,
                            0.00138145708f};
  VecF series = broadcast(kExp[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) series = series * r + kExp[i];
  const VecF power = 1.0f + (r + r * r * series);
  return (VecF)((VecFInt)power + ((VecFInt)shifted << 23));
}

// (k/2) log1p(u), or u for the Gaussian kernel, as scale · log + correction · log: the correction
// makes up for the rounding of k/2 and, to first order, of the factor in u, which would move all
// logits the same way.
struct LogitScale {
  bool gaussian;
  float scale;

  explicit LogitScale(double half_k)
      : gaussian(half_k == INFINITY), scale(gaussian ? 1 : static_cast<float>(half_k)) {}

  float correction(double half_k, double exact, float rounded) const {
    return static_cast<float>((gaussian ? 1 : half_k) * (exact / rounded) - scale);
  }
  VecF logits(VecF u, VecF correction) const {
    const VecF log = gaussian ? u : plain_log1p(u);
    return -(log * scale) - log * correction;
  }
};

}  // namespace
}  // namespace pfgm
