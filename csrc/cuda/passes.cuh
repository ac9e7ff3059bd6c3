// SPDX-License-Identifier: Apache-2.0
// The passes over queries and references. x is (B, d), rows of r are pitch(N) apart.
#pragma once

#include "launch.cuh"

namespace pfgm {

constexpr int kMaxDirectDim = 32;  // up to here direct differences in float

__host__ __device__ constexpr int64_t pitch(int64_t count) { return (count + 15) / 16 * 16; }

// Element `index` of the queries.
__device__ inline double load_query(const FieldParams& p, int64_t index) {
  return p.single ? p.x_single[index] : p.x[index];
}

// Which references direct differences in double are meant to take of each query: those whose r
// (route.cu) is at most its limit, all of them where that is NaN, none where it is −∞.
struct Left {
  float* limit;  // (B,)
  int* listed;   // (1 + B,) how many queries have a limit, and which, in any order; a kernel before
                 // those that set limits clears the first

  Left() = default;
  Left(const FieldParams& p, Workspace& workspace)
      : limit(workspace.take<float>(p.batch)), listed(workspace.take<int>(1 + p.batch)) {}

  __device__ void clear() const {
    if (blockIdx.x == 0 && threadIdx.x == 0) listed[0] = 0;
  }

  __device__ void set(int64_t b, float value) const {
    limit[b] = value;
    if (value != -INFINITY) listed[1 + atomicAdd(listed, 1)] = static_cast<int>(b);
  }
};

// exact_forward.cu, exact_backward.cu
//
// What products have summed of a query's other references; all null where there are none.
struct Summed {
  const float* r;      // (B, pitch)
  const double* base;  // (B,) squared distance of p.anchor; NaN: none was chosen, find the nearest
  const double* rest;  // (B,) Σ w of the other references, relative to the anchor
};
// displacement, log_mass, anchor and its log weight of queries with limit ≠ −∞; the displacement
// lacks what products have summed. total (B,) becomes Σ w of all references.
void exact_forward(const FieldParams& p, Workspace& workspace, const Left& left,
                   const Summed& summed, double* total);
// Adds to dx and dt, of the references within the limit, of queries with limit ≠ −∞; dvalues where
// p asks for it (every limit is then NaN). r (B, pitch) or null.
void exact_backward(const FieldParams& p, Workspace& workspace, const Left& left, const float* r);

// direct_forward.cu, direct_backward.cu: float queries, d ≤ kMaxDirectDim
void direct_forward(const FieldParams& p, Workspace& workspace);
void direct_backward(const FieldParams& p, Workspace& workspace);
void count_crowd(const FieldParams& p);  // p.crowd

// two_pass.cu: float queries, larger d
void two_pass_forward(const FieldParams& p, Workspace& workspace);
void two_pass_backward(const FieldParams& p, Workspace& workspace);

// Every reference of every query (exact_forward.cu).
Left all_references(const FieldParams& p, Workspace& workspace);

}  // namespace pfgm
