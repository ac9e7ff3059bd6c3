// SPDX-License-Identifier: Apache-2.0
// Which kernel computes which queries.
#include <vector>

#include "../field_math.h"
#include "common/kernels.h"
#include "common/sparse.h"

namespace pfgm {
namespace {

typedef void (*Fast)(const FieldParams&, uint8_t* uncertified);
typedef void (*Exact)(const FieldParams&, PFGM_ISA::Rows);

// The kernel that computes in float, or null where double is called for.
Fast choose(const FieldParams& p, Fast direct, Fast fused, Fast two_pass) {
  constexpr double kMostHalfK = 1e7;  // float has no digits of 1 + u where this is a logit of note
  const bool gaussian = p.half_k == INFINITY;
  if (!p.single || p.value_type == ValueType::kFloat64) return nullptr;
  if (p.dim <= PFGM_ISA::kMaxDirectDim)
    return p.half_k <= kMostHalfK || gaussian ? direct : nullptr;
  return in_fused(p) ? fused : two_pass;
}

// Whether the displacement all but cancels: its digits, of which a normalised field needs all, are
// then those that float does not have.
bool cancels(const RowReader& reader, int64_t b) {
  const FieldParams& p = reader.p;
  const int64_t ld = round_up(p.dim, kPad);
  const double t2 = p.t[b] * p.t[b], *displacement = p.displacement + b * ld;
  double square = 0;
  for (int64_t c = 0; c < p.dim; ++c) square += displacement[c] * displacement[c];
  const double anchor = pair_sums(reader, p.x + b * ld, nullptr, p.anchor[b]).distance;
  return square + t2 < 1e-6 * (anchor + t2);
}

// Runs the exact kernel for what the fast one could not certify.
void finish(const FieldParams& p, const uint8_t* uncertified, Exact exact) {
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (uncertified[b]) rows.push_back(b);
  }
  exact(p, {rows.data(), static_cast<int64_t>(rows.size())});
}

}  // namespace

void PFGM_ISA::field_forward(const FieldParams& p) {
  const Fast fast = choose(p, direct_forward, fused_forward, two_pass_forward);
  if (!fast) return exact_forward(p, {nullptr, p.batch});
  const Buffer<uint8_t> uncertified(p.batch);
  fast(p, uncertified.get());
  const RowReader reader(p);
  parallel_for(p.num_threads, p.batch, [&](int64_t b, int) {
    if (!uncertified[b]) uncertified[b] = cancels(reader, b);
  });
  finish(p, uncertified.get(), exact_forward);
}

void PFGM_ISA::field_backward_queries(const FieldParams& p) {
  const Fast fast =
      choose(p, direct_backward_queries, fused_backward_queries, two_pass_backward_queries);
  if (!fast) return exact_backward_queries(p, {nullptr, p.batch});
  const Buffer<uint8_t> uncertified(p.batch);
  fast(p, uncertified.get());
  finish(p, uncertified.get(), exact_backward_queries);
}

}  // namespace pfgm
