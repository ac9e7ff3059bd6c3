// SPDX-License-Identifier: Apache-2.0
// Which kernel computes which queries.
#include "kernels.h"

namespace pfgm {

void PFGM_ISA::field_forward(const FieldParams& p) { exact_forward(p, {nullptr, p.batch}); }

void PFGM_ISA::field_backward_queries(const FieldParams& p) {
  exact_backward_queries(p, {nullptr, p.batch});
}

}  // namespace pfgm
