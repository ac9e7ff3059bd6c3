// SPDX-License-Identifier: Apache-2.0
// Few dimensions: direct differences in float. What the forward and the backward pass share.
//
// The nearest reference is found first. Then all are weighed relative to where it lies, so that
// sums over parts of the references simply add up. Only squared distances are formed in float,
// never s:
//
//   1 + u = s/scale,  u = (‖x − x0‖² − origin)/scale,  scale = origin + t²
//
// holds relative to u however large t is (k = ∞: u = (‖x − x0‖² − origin)/(2t²) is the logit's
// size, and scale = origin). The forward pass leaves out the nearest and weighs it in double.
//
// A thread owns a few queries and goes over the references of its block's part, which are staged
// through shared memory. Where queries are few, lanes share one: each takes every shares-th
// reference.
#pragma once

#include "../field_math.h"
#include "intrinsics.cuh"
#include "passes.cuh"
#include "warp.cuh"

namespace pfgm {
namespace {

// Whether float does. Let ρ = 2⁻²⁴. A squared distance is off by δ ≈ 1.5 ρ/√d of itself (root mean
// square, and no more than ρ): 0.9 ρ/√d by its terms, 1.2 ρ/√d by their sums in groups of
// kDimGroup, and nothing by the sum of these, which is compensated. That moves a logit by
// δ (k/2) ‖x − x0_j‖²/s_j, which is at most δ k/2, and with the nearest reference, a, and logits
// relative to it at most
//
//   δ (reach + |logit_j|),  reach = (k/2) ‖x − x0_a‖²/s_a     (k = ∞: ‖x − x0_a‖²/(2t²)).
//
// u and logit are rounded by another 1.3 ρ |logit_j|; powers by 0.7 ρ min(k/2, |logit_j|) and, for
// k = 9, by 2 ρ. log_mass is off by Σ_j w_j times these. The nearest's weight is exact and no other
// is larger, so that the worst are two references that share the weight: δ reach/2, which is 2e-7,
// a fifth of what the contract allows, at a reach of kSmallReach and of kRootReach √d; D = 1 stays
// below. Equal references err alike, as one that may hold all weight: where there are any, half
// that reach is the most; of many the other errors are alike, too. The mean |logit| is at most
// log(N/Σ_j exp(logit_j)), by Jensen's inequality: that is added to the reach twice, for the other
// errors too, and at kCrowdReach they are a quarter of the contract. Gradients may be off by 1e-5
// of their terms: at kGradientReach they are by 2e-6 in a crowd. On a reference v is of the others
// alone: where they have less than kFaint of the weight, 1.3 ρ |logit_j| may be 1e-6 of it.
constexpr double kSmallReach = 7, kRootReach = 4.6, kCrowdReach = 5, kGradientReach = 50;
constexpr double kFaint = 1e-3;
constexpr int kDimGroup = 4;

constexpr int kMaxPower = 40;  // of 1/√(1 + u): higher ones are rounded more than logarithms
constexpr int kDirectThreads = 128;
constexpr int kTile = 128;  // references that are staged at a time
constexpr int kRun = 16;    // terms of a sum in plain float

// By dimension: queries of a thread, and references that it weighs together. Instructions of so
// many pairs hide each other's latency, while their differences and sums fit into registers.
template <int kDim>
struct Shape {
  static constexpr int kQueries = kDim <= 4 ? 4 : kDim <= 8 ? 2 : 1;
  static constexpr int kTogether = kDim <= 16 ? 2 : 1;
  // Blocks that a multiprocessor has registers for.
  static constexpr int blocks(bool backward) {
    return backward ? (kDim <= 2 ? 3 : 2) : kDim <= 2 ? 4 : kDim <= 16 ? 3 : 2;
  }
  static constexpr int kVector = kDim < 4 ? kDim : 4;
  // Floats from one reference to the next: lanes that read different ones avoid bank conflicts.
  static constexpr int kStride = kDim <= 4 ? kDim : kDim + 4;
  static_assert(kDim % kVector == 0 && kStride % kVector == 0, "rows are read in vectors");
  static_assert(kRun % kTogether == 0 && kTile % (32 * kTogether) == 0, "no row beyond the tile");
};

// How u becomes a weight.
struct Weighing {
  int power;  // k where powers are used, else 0
  float half_k, half_k_low;
  bool gaussian;

  explicit Weighing(double exact)
      : power(is_power(exact) ? static_cast<int>(2 * exact) : 0),
        half_k(exact == INFINITY ? 1 : static_cast<float>(exact)),
        half_k_low(exact == INFINITY ? 0 : static_cast<float>(exact - half_k)),
        gaussian(exact == INFINITY) {}

  static bool is_power(double half_k) {
    const double k = 2 * half_k;
    return k <= kMaxPower && k == static_cast<int>(k);
  }
};

// What a call's weights are relative to, for one query: its squared distance at some reference.
struct Scale {
  double half_k, offset, rate, s;
  bool gaussian;
  float origin, inverse, inverse_low;  // 1/scale, and what its rounding takes off, relatively

  __device__ Scale(const FieldParams& p, int64_t b, double distance)
      : half_k(p.half_k), rate(0.5 / (p.t[b] * p.t[b])), gaussian(p.half_k == INFINITY) {
    offset = gaussian ? 0 : p.t[b] * p.t[b];
    origin = static_cast<float>(distance);
    s = origin + offset;
    const double exact = gaussian ? rate : 1 / s;
    inverse = static_cast<float>(exact);
    inverse_low = static_cast<float>(exact / inverse - 1);
  }

  // Of a reference at this squared distance, relative to the scale.
  __device__ double logit(double distance) const {
    const double more = distance - origin;
    return gaussian ? -more * rate : -half_k * ::log1p(more / s);
  }

  __device__ double own_logit() const { return gaussian ? -s * rate : -half_k * ::log(s); }

  // How far a relative error of a squared distance moves its logit; NaN where float does not hold
  // what is formed.
  __device__ double reach(double distance) const {
    const double at = distance + offset, slope = gaussian ? rate : half_k / at;
    const double size = gaussian ? 1 / slope : at;
    return size > 1e-25 && size < 1e25 && distance < 1e25 ? distance * slope : NAN;
  }
};

struct DirectArguments {
  FieldParams p;
  Weighing weighing;
  int shares;          // lanes to a query
  int splits;          // parts of the references
  float* near_square;  // (B, splits) smallest squared distance
  int* near_chunk;     // (B, splits) and its chunk of 32 references
  double* square;      // (B,) squared distance of the nearest reference
  double* sums;        // (B, splits, d + 1)
  Left left;
};

// A block's place: its part of the references and its threads' queries.
template <int kDim>
struct Place {
  static constexpr int kQueries = Shape<kDim>::kQueries;

  int split, share, step;  // from one query of a thread to the next
  int size;                // of the part
  int64_t query, begin;

  __device__ explicit Place(const DirectArguments& a) {
    split = blockIdx.x % a.splits;
    share = threadIdx.x % a.shares;
    step = kDirectThreads / a.shares;
    query = blockIdx.x / a.splits * static_cast<int64_t>(step * kQueries) + threadIdx.x / a.shares;
    const int64_t tiles = (a.p.count + kTile - 1) / kTile;
    begin = tiles * split / a.splits * kTile;
    const int64_t end = tiles * (split + 1) / a.splits * kTile;
    size = static_cast<int>((end < a.p.count ? end : a.p.count) - begin);
  }

  // The q-th query; beyond the last, the last.
  __device__ int64_t row(const FieldParams& p, int q) const {
    const int64_t b = query + q * step;
    return b < p.batch ? b : p.batch - 1;
  }
};

__device__ inline float load_float(const FieldParams& p, int64_t index) {
  return p.value_type == ValueType::kUint8 ? p.table[static_cast<const uint8_t*>(p.values)[index]]
                                           : static_cast<const float*>(p.values)[index];
}

template <int kDim>
__device__ void clear_tile(float* tile) {
  for (int i = threadIdx.x; i < kTile * Shape<kDim>::kStride; i += kDirectThreads) tile[i] = 0;
}

// Stages kTile references from `first` on; beyond the last, the last. Columns beyond d stay zero.
template <int kDim>
__device__ void load_tile(const FieldParams& p, int64_t first, float* tile) {
  const int dim = static_cast<int>(p.dim),
            last = static_cast<int>(p.count - first < kTile ? p.count - first - 1 : kTile - 1);
  const int rows = kDirectThreads / dim, columns = kDirectThreads % dim;
  int row = threadIdx.x / dim, column = threadIdx.x % dim;
  __syncthreads();
  PFGM_UNROLL_BY_FOUR
  while (row < kTile) {
    const int64_t source = first + (row < last ? row : last);
    tile[row * Shape<kDim>::kStride + column] = load_float(p, source * dim + column);
    row += rows;
    column += columns;
    if (column >= dim) {
      column -= dim;
      ++row;
    }
  }
  __syncthreads();
}

template <int kDim>
__device__ __forceinline__ void load_row(const float* tile, int row, float (&y)[kDim]) {
  constexpr int kVector = Shape<kDim>::kVector;
  struct alignas(kVector * sizeof(float)) Vector {
    float v[kVector];
  };
  PFGM_UNROLL
  for (int c = 0; c < kDim; c += kVector) {
    const Vector vector = *reinterpret_cast<const Vector*>(tile + row * Shape<kDim>::kStride + c);
    PFGM_UNROLL
    for (int i = 0; i < kVector; ++i) y[c + i] = vector.v[i];
  }
}

// What cotangents are divided by, so that float holds them.
__device__ inline double cotangent_unit(const FieldParams& p, int64_t b, double constant) {
  double square = 0;
  for (int64_t c = 0; c < p.dim; ++c) {
    const double g = p.grad_displacement[b * p.dim + c];
    square += g * g;
  }
  const double s = p.anchor_square[b] + RadialKernel(p.half_k, p.t[b]).offset;
  const double unit = ::sqrt(square * s) + ::fabs(constant);
  return unit == 0 ? 1 : unit;
}

// A warp combines what was summed of query b: column `lane` of the sums, or 0 beyond d, and the
// last one.
__device__ inline double combine_sums(const DirectArguments& a, int64_t b, double& last) {
  const int lane = threadIdx.x % 32;
  const int64_t width = a.p.dim + 1;
  const double* const sums = a.sums + b * a.splits * width;
  last = 0;
  for (int split = lane; split < a.splits; split += 32) last += sums[split * width + a.p.dim];
  last = warp_sum(last);
  double sum = 0;
  if (lane < a.p.dim) {
    PFGM_UNROLL_BY_FOUR
    for (int split = 0; split < a.splits; ++split) sum += sums[split * width + lane];
  }
  return sum;
}

// Whether float does; else all references of query b are left to direct differences in double.
__device__ inline bool settle(const DirectArguments& a, int64_t b, bool sure, double sum,
                              double last) {
  const bool finite = sum - sum == 0 && last - last == 0;
  const bool done = sure && __ballot_sync(kAllLanes, finite) == kAllLanes;
  if (threadIdx.x % 32 == 0) a.left.set(b, done ? -INFINITY : NAN);
  return done;
}

// How a call is shared out among blocks.
inline DirectArguments share_out(const FieldParams& p, double half_k, Workspace& workspace) {
  constexpr int kBlocksEach = 8, kLeast = 4;  // blocks to a multiprocessor, tiles to a part
  DirectArguments a{p, Weighing(half_k), 1, 1, nullptr, nullptr, nullptr, nullptr, Left()};
  switch_dim<2, 4, 8, 16, 24, 32>(p.dim, [&](auto dim) {
    constexpr int kQueries = Shape<decltype(dim)::value>::kQueries;
    while (a.shares < 32 && kDirectThreads / (2 * a.shares) * kQueries >= p.batch) a.shares *= 2;
    const int64_t blocks = divide_up(p.batch, kDirectThreads / a.shares * kQueries);
    const int64_t wanted = divide_up(kBlocksEach * multiprocessors(p), blocks) + (p.count >> 30);
    const int64_t most = divide_up(p.count, kLeast * kTile);
    a.splits = static_cast<int>(wanted < most ? wanted : most);
  });
  a.sums = workspace.take<double>(p.batch * a.splits * (p.dim + 1));
  a.left = Left(p, workspace);
  return a;
}

// Launches the kernel that `choose` returns for the dimension, given as an integral_constant.
template <class Choose>
void launch_direct(const DirectArguments& a, Choose choose) {
  switch_dim<2, 4, 8, 16, 24, 32>(a.p.dim, [&](auto dim) {
    using Shape = Shape<decltype(dim)::value>;
    const int64_t queries = kDirectThreads / a.shares * Shape::kQueries;
    launch(choose(dim), divide_up(a.p.batch, queries) * a.splits, kDirectThreads,
           kTile * Shape::kStride * sizeof(float), a);
  });
}

// Launches a kernel with a warp to each query.
inline void launch_warps(void (*kernel)(DirectArguments), const DirectArguments& a) {
  launch(kernel, divide_up(a.p.batch, kDirectThreads / 32), kDirectThreads, 0, a);
}

__device__ inline int64_t query_of_warp() {
  return (static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x) / 32;
}

}  // namespace
}  // namespace pfgm
