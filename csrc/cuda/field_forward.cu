// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), for d ≤ 32 by direct differences:
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
//
// field_forward_kernel: a thread takes one query, or where queries are few a warp's threads share
// one; the block stages tiles of references in shared memory, and the grid's second dimension
// shares out the references in num_splits contiguous parts. combine_kernel: a warp per query adds
// up the parts.
#include <algorithm>
#include <cmath>

#include "../field_math.h"
#include "launch.cuh"

namespace pfgm {
namespace {

constexpr int kThreads = 128;
constexpr int kMinBlocks = 2;  // per multiprocessor: for more, the compiler would spill registers
constexpr int kWarp = 32;
constexpr double kMaxPower = 4096;  // of k: beyond, multiplying up the weights costs accuracy

__device__ int64_t query_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Adds up the sums of the blockDim.x threads that share a query: the first of them ends up with
// the total. Every thread of the warp takes part.
template <int kDim>
__device__ void reduce_shares(OnlineState& state, int64_t& anchor, double (&displacement)[kDim],
                              const RadialKernel& kernel) {
  constexpr unsigned kAll = 0xffffffff;
  for (int mask = blockDim.x / 2; mask > 0; mask /= 2) {
    OnlineState other;
    other.nearest = __shfl_xor_sync(kAll, state.nearest, mask);
    other.sum = __shfl_xor_sync(kAll, state.sum, mask);
    const int64_t other_anchor = __shfl_xor_sync(kAll, anchor, mask);
    if (other.nearest < state.nearest) anchor = other_anchor;
    const auto factors = state.merge(other, kernel);
    PFGM_UNROLL
    for (int c = 0; c < kDim; ++c) {
      const double column = __shfl_xor_sync(kAll, displacement[c], mask);
      displacement[c] = factors.own * displacement[c] + factors.theirs * column;
    }
  }
}

// Grid (queries, splits), block (shares, queries): shares is a power of two up to a warp.
template <int kDim, bool kPower>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    field_forward_kernel(const __grid_constant__ FieldParams p) {
  using Sum = DirectSum<kDim, kPower>;
  constexpr int kTileRows = kDim <= 8 ? 256 : 2048 / kDim;
  alignas(16) __shared__ double tile[kTileRows * Sum::kStride];

  const int64_t b = query_of_thread();
  const bool active = b < p.batch;
  Sum sum(p.half_k, active ? p.t[b] : 0);
  PFGM_UNROLL
  for (int c = 0; c < kDim; ++c) sum.x[c] = active && c < p.dim ? p.x[b * p.dim + c] : 0;

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t begin = p.count * blockIdx.y / p.num_splits;
  const int64_t end = p.count * (blockIdx.y + 1) / p.num_splits;
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int count = end - first < kTileRows ? static_cast<int>(end - first) : kTileRows;
    __syncthreads();
    for (int i = thread; i < count * kDim; i += kThreads) {
      const int row = i / kDim, c = i % kDim;
      tile[row * Sum::kStride + c] = c < p.dim ? decode(p, (first + row) * p.dim + c) : 0;
    }
    __syncthreads();
    if (active) sum.add_tile(tile, count, first, threadIdx.x, blockDim.x);
  }

  reduce_shares(sum.state, sum.anchor, sum.displacement, sum.kernel);
  if (!active || threadIdx.x != 0) return;
  const int64_t out = blockIdx.y * p.batch + b;
  p.nearest[out] = sum.state.nearest;
  p.sum[out] = sum.state.sum;
  p.anchor[out] = sum.anchor;
  PFGM_UNROLL
  for (int c = 0; c < kDim; ++c) {
    if (c < p.dim) p.displacement[out * p.dim + c] = sum.displacement[c];
  }
}

// Grid (queries), block (warp, queries): combines the splits of each query into split 0 and
// normalises.
template <int kDim>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    combine_kernel(const __grid_constant__ FieldParams p) {
  const int64_t b = query_of_thread();
  if (b >= p.batch) return;  // the whole warp
  const RadialKernel kernel(p.half_k, p.t[b]);
  OnlineState state;
  int64_t anchor = 0;
  double displacement[kDim] = {};
  for (int split = threadIdx.x; split < p.num_splits; split += kWarp) {
    const int64_t part = split * p.batch + b;
    OnlineState other;
    other.nearest = p.nearest[part];
    other.sum = p.sum[part];
    if (other.nearest < state.nearest) anchor = p.anchor[part];
    const auto factors = state.merge(other, kernel);
    PFGM_UNROLL
    for (int c = 0; c < kDim; ++c) {
      const double column = c < p.dim ? p.displacement[part * p.dim + c] : 0;
      displacement[c] = factors.own * displacement[c] + factors.theirs * column;
    }
  }
  reduce_shares(state, anchor, displacement, kernel);
  if (threadIdx.x != 0) return;
  PFGM_UNROLL
  for (int c = 0; c < kDim; ++c) {
    if (c < p.dim) p.displacement[b * p.dim + c] = displacement[c] / state.sum;
  }
  p.anchor[b] = anchor;
  p.log_mass[b] = kernel.logit(state.nearest) + ::log(state.sum);
  p.anchor_log_weight[b] = -::log(state.sum);
}

dim3 grid_of(int64_t batch, int queries, int splits) {
  return dim3(static_cast<unsigned>((batch + queries - 1) / queries), splits);
}

template <int kDim>
void forward(const FieldParams& p) {
  int shares = 1;
  while (shares < kWarp && p.batch * shares * 2 <= kThreads) shares *= 2;
  const int queries = kThreads / shares;
  const double k = 2 * p.half_k;
  const bool power = k <= kMaxPower && k == std::floor(k);
  const auto kernel = power ? field_forward_kernel<kDim, true> : field_forward_kernel<kDim, false>;
  launch(kernel, grid_of(p.batch, queries, p.num_splits), dim3(shares, queries), p);
  launch(combine_kernel<kDim>, grid_of(p.batch, kThreads / kWarp, 1), dim3(kWarp, kThreads / kWarp),
         p);
}

void check_params(const FieldParams& p) {
  constexpr int64_t kMaxQueryBlocks = 0x7fffffff, kMaxSplits = 0xffff;  // of a grid
  if (p.count < 1 || p.dim < 1 || !(p.half_k > 0) || p.num_splits < 1 ||
      p.num_splits > std::min(p.count, kMaxSplits) ||
      p.batch > kMaxQueryBlocks * (kThreads / kWarp)) {
    throw std::invalid_argument("CUDA kernel called with sizes out of range");
  }
  if (!p.x || !p.t || !p.values || (p.value_type == ValueType::kUint8 && !p.table) ||
      !p.displacement || !p.nearest || !p.sum || !p.anchor || !p.log_mass || !p.anchor_log_weight) {
    throw std::invalid_argument("CUDA kernel called with a null pointer");
  }
}

}  // namespace

void field_forward_cuda(const FieldParams& p) {
  if (p.batch == 0) return;
  check_params(p);
  const DeviceGuard guard(p.device);
  switch_dim<1, 2, 3, 4, 8, 16, 32>(p.dim, [&](auto dim) { forward<dim>(p); });
}

const char* cuda_unavailable() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no driver is installed";
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace pfgm
