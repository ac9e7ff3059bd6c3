// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' sources are compiled once per instruction set, each into a namespace of its own
// (PFGM_ISA); dispatch.cpp chooses among them at run time.
#pragma once

#include "../../poisson_field.h"
#include "parallel.h"

#define PFGM_DECLARE_KERNELS(isa)                     \
  namespace pfgm::isa {                               \
  void field_forward(const FieldParams&);             \
  void field_backward_queries(const FieldParams&);    \
  void field_backward_references(const FieldParams&); \
  void prepare_references(const FieldParams&);        \
  void field_finish(const FieldParams&);              \
  void field_begin(const FieldParams&);               \
  }

#ifdef PFGM_ISA
PFGM_DECLARE_KERNELS(PFGM_ISA)

namespace pfgm::PFGM_ISA {

// The queries that a kernel is asked for: `size` rows of the batch, all of them where index is
// null.
struct Rows {
  const int64_t* index;
  int64_t size;
  int64_t operator[](int64_t i) const { return index ? index[i] : i; }
};

// Direct differences in double: every case, at the accuracy of float64 input.
void exact_forward(const FieldParams&, Rows);
void exact_backward_queries(const FieldParams&, Rows);

// Direct differences in float, for d ≤ kMaxDirectDim. uncertified (B,): set to 1 for the queries
// whose distances leave the range in which float keeps its relative precision; 0 for the others.
constexpr int64_t kMaxDirectDim = 24;
void direct_forward(const FieldParams&, uint8_t* uncertified);
void direct_backward_queries(const FieldParams&, uint8_t* uncertified);

// One pass of products in float, for d ≤ kMaxFusedDim.
constexpr int64_t kMaxFusedDim = 256;
void fused_forward(const FieldParams&, uint8_t* uncertified);
void fused_backward_queries(const FieldParams&, uint8_t* uncertified);

// Two passes of products, in float or in 8-bit integers, for any d.
void two_pass_forward(const FieldParams&, uint8_t* uncertified);
void two_pass_backward_queries(const FieldParams&, uint8_t* uncertified);

}  // namespace pfgm::PFGM_ISA
#endif
