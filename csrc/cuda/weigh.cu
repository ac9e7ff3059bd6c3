// SPDX-License-Identifier: Apache-2.0
// Weights of the references beyond the limits (route.cu), and what becomes of sums of them.
#include "float_math.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

// A warp takes a query and a group of references: weights of limit < r ≤ cut as two parts, zeros
// elsewhere; in the backward pass w_j (g·y_j + constant) s_a/s_j instead, to which c_j is
// proportional.
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const __grid_constant__ TwoPassArguments a) {
  const FieldParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t blocks = (a.groups + kWarps - 1) / kWarps, b = blockIdx.x / blocks;
  const int64_t group = blockIdx.x % blocks * kWarps + threadIdx.x / kWarp;
  if (group >= a.groups) return;
  const int64_t to = b * a.groups + group;
  const float limit = a.left.limit[b], cut = a.cut[b];
  if (cut == -INFINITY) {
    if (lane == 0) a.active[to] = 0;
    return;
  }
  const bool gaussian = p.half_k == INFINITY;
  const float half_k = gaussian ? 1.0f : static_cast<float>(p.half_k);
  const float high_origin = a.scales[b], low_origin = a.scales[p.batch + b];
  const float inverse = a.scales[2 * p.batch + b], correction = a.scales[3 * p.batch + b];
  const float log_weight = a.backward ? static_cast<float>(p.anchor_log_weight[b]) : 0.0f;
  const float constant = a.backward ? static_cast<float>(a.constant[b]) : 0.0f;
  const float constant_low = a.backward ? static_cast<float>(a.constant[b] - constant) : 0.0f;

  uint16_t* const weights = a.weights + b * a.stride();
  const int64_t low_part = p.batch * a.stride();
  float sum = 0, moment = 0;
  unsigned active = 0;
  for (int tile = 0; tile < kGroup / kBlockK; ++tile) {
    const int64_t j = group * kGroup + tile * kBlockK + lane;
    float w = 0;
    // Beyond the last reference r is infinite.
    if (j < p.count && a.minima[b * a.tiles + j / kTile] <= cut) {
      const float r = a.r[b * a.pitch + j];
      if (r > limit && r <= cut) {
        float u = ((r - high_origin) - low_origin) * inverse;
        if (u > 1e30f) u = 1e30f;
        w = ::expf(logit_float(u, half_k, correction, gaussian) + log_weight);
        if (a.backward) {
          w *= (a.pull[b * a.pitch + j] + constant) + constant_low;
          if (!gaussian) w /= 1 + u;
        }
        sum += w;
        moment += w * u;
      }
    }
    const uint16_t high = to_bfloat16(w);
    weights[j] = high;
    weights[low_part + j] = to_bfloat16(w - from_bfloat16(high));
    active |= static_cast<unsigned>(__any_sync(kAllLanes, w != 0) != 0) << tile;
  }
  const double sums[2] = {warp_sum(sum), warp_sum(moment)};
  if (lane != 0) return;
  a.active[to] = static_cast<uint8_t>(active);
  a.sums[to] = sums[0];
  a.sums[p.batch * a.groups + to] = sums[1];
}

// The tiles of kBlockK references in which any query of a block of kTile has a weight, in order.
__global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ TwoPassArguments a) {
  const int64_t block = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t first = block * kTile;
  const int64_t end = first + kTile < a.p.batch ? first + kTile : a.p.batch;
  int* const counts = shared_memory<int>();  // (kWarps,)
  int length = 0;
  for (int64_t start = 0; start < a.groups; start += kThreads) {
    const int64_t group = start + thread;
    unsigned active = 0;
    for (int64_t b = first; b < end && group < a.groups; ++b) {
      active |= a.active[b * a.groups + group];
    }
    int before = __popc(active);  // tiles listed up to this thread's
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, offset);
      if (lane >= offset) before += other;
    }
    if (lane == kWarp - 1) counts[warp] = before;
    __syncthreads();
    before += length - __popc(active);
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += counts[i];
      length += counts[i];
    }
    int* to = a.list + block * a.list_stride() + before;
    for (int tile = 0; tile < kGroup / kBlockK; ++tile) {
      if (active >> tile & 1) *to++ = static_cast<int>(group * (kGroup / kBlockK) + tile);
    }
    __syncthreads();  // counts may be overwritten
  }
  if (thread == 0) a.length[block] = length;
}

// A warp takes a query: rest and moment.
__global__ void __launch_bounds__(kThreads)
    rest_kernel(const __grid_constant__ TwoPassArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (b >= a.p.batch) return;
  double rest = 0, moment = 0;
  const double* const sums = a.sums + b * a.groups;
  for (int64_t group = lane; group < a.groups && a.cut[b] != -INFINITY; group += kWarp) {
    rest += sums[group];
    moment += sums[a.p.batch * a.groups + group];
  }
  rest = warp_sum(rest);
  moment = warp_sum(moment);
  if (lane != 0) return;
  a.rest[b] = rest;
  a.moment[b] = moment;
}

// Adds to the displacement, or to dx, and to dt what the products have summed, a column to a
// thread:
//
//     factor · Σ_j w_j (x0_j − x)
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ TwoPassArguments a) {
  const FieldParams& p = a.p;
  const int64_t blocks = (p.dim + kThreads - 1) / kThreads, b = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (column >= p.dim || a.cut[b] == -INFINITY) return;
  const double unit = p.header[0];
  double factor;
  if (a.backward) {
    const double t = p.t[b], base = p.anchor_square[b];
    const RadialKernel kernel(p.half_k, t);
    const double c = unit * kernel.slope(base);  // c_j, over its weight
    if (column == 0) {
      p.dt[b] += kernel.gaussian ? 2 / t * c * (base * a.rest[b] + 2 * t * t * a.moment[b])
                                 : -2 * t * c * a.rest[b];
    }
    factor = 2 * c;
  } else {
    factor = 1 / a.total[b];
  }
  double sum = 0;
  const int splits = a.length[b / kTile] == 0 ? 0 : a.splits;  // else they are not written
  for (int split = 0; split < splits; ++split) {
    sum += a.products[(split * p.batch + b) * a.width + column];
  }
  const int64_t index = b * p.dim + column;
  double* const out = a.backward ? p.dx : p.displacement;
  out[index] += factor * (unit * sum + a.rest[b] * (p.origin[column] - load_query(p, index)));
}

}  // namespace

void weigh(const TwoPassArguments& a) {
  const int64_t blocks = a.p.batch * divide_up(a.groups, kWarps);
  launch(weigh_kernel, blocks, kThreads, 0, a);
  launch(list_kernel, divide_up(a.p.batch, kTile), kThreads, kWarps * sizeof(int), a);
  launch(rest_kernel, divide_up(a.p.batch, kWarps), kThreads, 0, a);
}

void combine(const TwoPassArguments& a) {
  const int64_t blocks = a.p.batch * divide_up(a.p.dim, kThreads);
  launch(combine_kernel, blocks, kThreads, 0, a);
}

}  // namespace pfgm
