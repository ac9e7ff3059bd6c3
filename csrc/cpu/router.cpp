// SPDX-License-Identifier: Apache-2.0
// Which kernel computes which queries.
#include <vector>

#include "kernels.h"

namespace pfgm {
namespace {

typedef void (*Fast)(const FieldParams&, uint8_t* uncertified);
typedef void (*Exact)(const FieldParams&, PFGM_ISA::Rows);

// The kernel that computes in float, or null where double is called for.
Fast choose(const FieldParams& p, Fast direct, Fast two_pass) {
  if (!p.single || p.value_type == ValueType::kFloat64) return nullptr;
  return p.dim <= PFGM_ISA::kMaxDirectDim ? direct : two_pass;
}

// Runs the fast kernel, and the exact one for what it could not certify.
void run(const FieldParams& p, Fast fast, Exact exact) {
  if (!fast) return exact(p, {nullptr, p.batch});
  const Buffer<uint8_t> uncertified(p.batch);
  fast(p, uncertified.get());
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (uncertified[b]) rows.push_back(b);
  }
  exact(p, {rows.data(), static_cast<int64_t>(rows.size())});
}

}  // namespace

void PFGM_ISA::field_forward(const FieldParams& p) {
  run(p, choose(p, direct_forward, two_pass_forward), exact_forward);
}

void PFGM_ISA::field_backward_queries(const FieldParams& p) {
  run(p, choose(p, direct_backward_queries, two_pass_backward_queries), exact_backward_queries);
}

}  // namespace pfgm
