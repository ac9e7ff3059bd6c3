// SPDX-License-Identifier: Apache-2.0
// What the kernels of the two passes share: their arguments, and reductions.
#pragma once

#include "../field_math.h"
#include "intrinsics.cuh"
#include "kernel_traits.cuh"
#include "passes.cuh"
#include "warp.cuh"

namespace pfgm {

enum class RowsOf { kReferences, kQueries, kCotangents };

// Rows of values and of what the tensor cores read of them: y = (value − origin)/unit as a sum of
// bfloat16 parts, y = code − 128 where the references are codes.
struct SplitArguments {
  FieldParams p;
  RowsOf of;
  Left left;  // for queries: what is cleared
  int64_t count;
  int num_parts;
  uint16_t* parts;  // (num_parts, count, width), a part `plane` after the other
  int64_t plane;
  double* squares;  // (count,) ‖y‖²
  double* marks;    // (count,) see split_kernel; but for references
  // Of references: how many copies one has, at most, how many are a copy of one before, and slots,
  // a power of two of them: a name each and how many copies of that came.
  int64_t slots = 0;
  int* copies = nullptr;
};

struct CompareArguments {
  FieldParams p;
  int num_parts;
  const uint16_t* a;  // (num_parts, B, width) of queries or cotangents
  int64_t width, pitch;
  float* out;        // (B, pitch)
  float* minima;     // (B, tiles)
  const float* cut;  // (B,) or null, see compare_kernel
};

// One call of the two passes: pieces of the workspace.
struct TwoPassArguments {
  FieldParams p;
  bool backward;
  int64_t width, pitch;   // columns with padding; of rows of r
  int64_t tiles, groups;  // ⌈N/kTile⌉; ⌈N/kGroup⌉
  int num_parts;          // of queries
  int splits;             // sums over references that a product is split into

  uint16_t* queries;  // (num_parts, B, width)
  double* squares;    // (B,) ‖x'‖²
  double* shared;     // (B,) what the products x'·y_j of a query all lack
  float* r;           // (B, pitch)
  float* minima;      // (B, tiles) of r
  Left left;
  float* cut;     // (B,) −∞ where no references are summed by products
  double* base;   // (B,) squared distance of the anchor, NaN without a cut
  float* scales;  // (4, B) u = ((r − scales[0]) − scales[1]) scales[2]; see logit_float

  uint16_t* cotangents;  // (num_parts, B, width), backward only, as the next three
  double* cotangent_squares;
  double* constant;  // (B,) a_j + g_m = unit (pull_j + constant)
  float* pull;       // (B, pitch) g·y_j, where a tile has weights

  uint16_t* weights;  // (2, B, kGroup · groups) parts, of queries with a cut
  uint8_t* active;    // (B, groups) which tiles of a group have weights
  double* sums;       // (2, B, groups) Σ w, Σ w u
  int* list;          // (blocks of queries, tiles of kBlockK) those with weights, in order
  int* length;        // (blocks of queries,)
  double* rest;       // (B,) Σ w
  double* moment;     // (B,) Σ w u
  float* products;    // (splits, B, width) Σ w y
  double* total;      // (B,) Σ w of all references

  PFGM_HOST_DEVICE int64_t stride() const { return kGroup * groups; }  // of weights
  PFGM_HOST_DEVICE int64_t list_stride() const { return kGroup / kBlockK * groups; }
};

PFGM_HOST_DEVICE int64_t width_of(int64_t dim) {
  return (dim + kWidthMultiple - 1) / kWidthMultiple * kWidthMultiple;
}

namespace {

// What combine makes of the v of all threads of the block, for each of them; all call.
template <class T, class Combine>
__device__ T block_reduce(T v, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  T* const scratch = shared_memory<T>();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) v = combine(v, scratch[warp]);
  __syncthreads();  // scratch may be overwritten
  return v;
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Least {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

constexpr size_t kReductionBytes = kWarps * sizeof(double);

}  // namespace

// operands.cu
void split(const SplitArguments& a);
// products_compare.cu, products_sum.cu
void compare(const CompareArguments& a);
void weighted_sum(const TwoPassArguments& a);
// route.cu, weigh.cu
void route(const TwoPassArguments& a);
void weigh(const TwoPassArguments& a);
void combine(const TwoPassArguments& a);

}  // namespace pfgm
