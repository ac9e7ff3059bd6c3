// SPDX-License-Identifier: Apache-2.0
// The passes over queries and references. A query's limit says which references direct differences
// in double are meant to take: those whose r (route.cu) is at most that, all of them where it is
// NaN, none where it is −∞. x is (B, d), rows of r are pitch(N) apart.
#pragma once

#include "launch.cuh"

namespace pfgm {

constexpr int kMaxDirectDim = 32;  // up to here direct differences in float

__host__ __device__ constexpr int64_t pitch(int64_t count) { return (count + 15) / 16 * 16; }

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
void exact_forward(const FieldParams& p, Workspace& workspace, const float* limit,
                   const Summed& summed, double* total);
// dx and dt, of the references within the limit, of queries with limit ≠ −∞; and dvalues where p
// asks for it (every limit is then NaN). r (B, pitch) or null.
void exact_backward(const FieldParams& p, Workspace& workspace, const float* limit, const float* r);

// direct_forward.cu, direct_backward.cu: float queries, d ≤ kMaxDirectDim
void direct_forward(const FieldParams& p, Workspace& workspace);
void direct_backward(const FieldParams& p, Workspace& workspace);

// two_pass.cu: float queries, larger d
void two_pass_forward(const FieldParams& p, Workspace& workspace);
void two_pass_backward(const FieldParams& p, Workspace& workspace);

// A row of B floats, all NaN: every reference of every query (exact_forward.cu).
float* all_references(const FieldParams& p, Workspace& workspace);

}  // namespace pfgm
