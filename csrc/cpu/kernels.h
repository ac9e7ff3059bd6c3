// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' sources are compiled once per instruction set, each into a namespace of its own
// (PFGM_ISA); dispatch.cpp chooses among them at run time.
#pragma once

#include <omp.h>

#include "../poisson_field.h"

#define PFGM_DECLARE_KERNELS(isa)                     \
  namespace pfgm::isa {                               \
  void field_forward(const FieldParams&);             \
  void field_backward_queries(const FieldParams&);    \
  void field_backward_references(const FieldParams&); \
  }

#ifdef PFGM_ISA
PFGM_DECLARE_KERNELS(PFGM_ISA)

namespace pfgm {
namespace {

constexpr int64_t kTile = 64;  // queries that share a decoded block of references

// Queries per task: large enough to pay for decoding, small enough to balance the threads.
inline int64_t tile_size(const FieldParams& p) {
  const int64_t fair = p.batch / (2 * p.num_threads) / 4 * 4;
  return fair < kTile / 2 ? kTile / 2 : fair < kTile ? fair : kTile;
}

inline double* thread_scratch(const FieldParams& p) {
  return p.scratch + omp_get_thread_num() * scratch_size(p.dim);
}

}  // namespace
}  // namespace pfgm
#endif
