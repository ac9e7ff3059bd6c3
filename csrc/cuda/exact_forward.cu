// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), by direct differences in double:
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
#include "exact.cuh"

namespace pfgm {
namespace {

// Weights relative to the anchor that products were summed with, or else to the nearest so far.
struct ForwardPass {
  static constexpr bool kPull = false;

  RadialKernel kernel;
  bool chosen;
  double nearest, cutoff, sum = 0;
  int64_t anchor = 0;

  __device__ ForwardPass(const ExactArguments& a, const Task& task)
      : kernel(a.p.half_k, a.p.t[task.b]),
        nearest(INFINITY),
        cutoff(::exp(-kCutoff - log_count(a.p))) {
    const double base = a.summed.base == nullptr ? NAN : a.summed.base[task.b];
    chosen = base == base;
    if (chosen) nearest = base;
  }

  __device__ double weigh(const Task& task, const int* rows, int count, Scratch& scratch,
                          bool& heavy) {
    const bool mine = static_cast<int>(threadIdx.x) < count;
    const double square = mine ? scratch.squares[threadIdx.x] : INFINITY;
    const int64_t place = mine ? task.begin + rows[threadIdx.x] : 0;
    const double factor = chosen ? 1 : move(square, place, scratch);
    const double weight = mine ? kernel.relative_weight(square, nearest) : 0;
    scratch.weights[threadIdx.x] = weight;
    sum = sum * factor + weight;
    heavy = !(weight <= cutoff);
    return factor;
  }

  // Moves to the nearest of the block's references if that is nearer; returns what it scales.
  __device__ double move(double square, int64_t place, Scratch& scratch) {
    for (int other = 16; other > 0; other /= 2) {
      const double theirs = __shfl_xor_sync(kAllLanes, square, other);
      const int64_t their_place = __shfl_xor_sync(kAllLanes, place, other);
      const bool nearer =
          theirs < square || (theirs == square && their_place < place) || square != square;
      square = nearer ? theirs : square;
      place = nearer ? their_place : place;
    }
    if (lane() == 0) {
      scratch.partial[warp()] = square;
      scratch.places[warp()] = place;
    }
    __syncthreads();
    const double former = nearest;
    for (int w = 0; w < kWarps; ++w) {  // places grow with the warp
      if (scratch.partial[w] < nearest) {
        nearest = scratch.partial[w];
        anchor = scratch.places[w];
      }
    }
    if (nearest == former) return 1;
    return former == INFINITY ? 0 : kernel.relative_weight(former, nearest);
  }

  __device__ Part finish(Scratch& scratch) const {
    return {nearest, block_sum(sum, scratch.partial), anchor, false};
  }

  __device__ static void combine(const ExactArguments& a, int64_t b, const Part* parts, int count,
                                 double* factors, bool write) {
    const RadialKernel kernel(a.p.half_k, a.p.t[b]);
    const double base = a.summed.base == nullptr ? NAN : a.summed.base[b];
    double nearest = base == base ? base : INFINITY;
    int64_t anchor = 0;
    for (int i = 0; i < count; ++i) {
      if (parts[i].nearest < nearest) {
        nearest = parts[i].nearest;
        anchor = parts[i].anchor;
      }
    }
    for (int i = threadIdx.x; i < count; i += kExactThreads) {
      factors[i] = kernel.relative_weight(parts[i].nearest, nearest);
    }
    __syncthreads();
    double total = a.summed.rest == nullptr ? 0 : a.summed.rest[b];
    for (int i = 0; i < count; ++i) {
      if (!parts[i].empty) total += factors[i] * parts[i].sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kExactThreads) factors[i] /= total;
    __syncthreads();
    if (!write || threadIdx.x != 0) return;
    a.total[b] = total;
    if (base != base) a.p.anchor[b] = anchor;
    a.p.log_mass[b] = RadialKernel(a.p.half_k, a.p.t[b]).logit(nearest) + ::log(total);
    a.p.anchor_log_weight[b] = -::log(total);
  }
};

struct FillArguments {
  FieldParams p;
  Left left;
};

__global__ void __launch_bounds__(kExactThreads)
    fill_kernel(const __grid_constant__ FillArguments a) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kExactThreads + threadIdx.x;
  if (b >= a.p.batch) return;
  a.left.limit[b] = NAN;
  a.left.listed[1 + b] = static_cast<int>(b);
  if (b == 0) a.left.listed[0] = static_cast<int>(a.p.batch);
}

}  // namespace

void exact_forward(const FieldParams& p, Workspace& workspace, const Left& left,
                   const Summed& summed, double* total) {
  ExactArguments a{};
  a.p = p;
  a.left = left;
  a.r = summed.r;
  a.summed = summed;
  a.total = total;
  a.result = p.displacement;
  run_exact<ForwardPass>(a, workspace);
}

Left all_references(const FieldParams& p, Workspace& workspace) {
  const FillArguments a{p, Left(p, workspace)};
  launch(fill_kernel, divide_up(p.batch, kExactThreads), kExactThreads, 0, a);
  return a.left;
}

}  // namespace pfgm
