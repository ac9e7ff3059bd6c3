// SPDX-License-Identifier: Apache-2.0
// Chooses among the instruction sets that the CPU kernels were compiled for.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "classes.h"
#include "common/kernels.h"

PFGM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
PFGM_DECLARE_KERNELS(avx2)
PFGM_DECLARE_KERNELS(avx512)
PFGM_DECLARE_KERNELS(avx512vnni)
#endif

namespace pfgm {
namespace {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*forward)(const FieldParams&);
  void (*backward_queries)(const FieldParams&);
  void (*backward_references)(const FieldParams&);
  void (*prepare_references)(const FieldParams&);
  void (*finish)(const FieldParams&);
  void (*begin)(const FieldParams&);
};

#define PFGM_KERNELS(isa, condition) \
  {#isa,                             \
   [] { return bool(condition); },   \
   isa::field_forward,               \
   isa::field_backward_queries,      \
   isa::field_backward_references,   \
   isa::prepare_references,          \
   isa::field_finish,                \
   isa::field_begin}

// Best first.
const Kernels kKernels[] = {
#if defined(__x86_64__)
    PFGM_KERNELS(avx512vnni,
                 __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vnni")),
    PFGM_KERNELS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512bw")),
    PFGM_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    PFGM_KERNELS(portable, true),
};

const Kernels* chosen = std::find_if(std::begin(kKernels), std::end(kKernels),
                                     [](const Kernels& k) { return k.runs_here(); });

void check(const FieldParams& p, const void* x) {
  if (p.batch < 0 || p.count < 1 || p.dim < 1 || p.num_threads < 1 || !(p.half_k > 0)) {
    throw std::invalid_argument("CPU kernel called with sizes out of range");
  }
  // An empty tensor has no address.
  if ((p.batch > 0 && (!x || !p.t)) || !p.values) {
    throw std::invalid_argument("CPU kernel called with a null pointer");
  }
}

void check(const FieldParams& p) { check(p, p.x); }

void check_rows(const FieldParams& p) {
  check(p, p.single ? static_cast<const void*>(p.x_single) : p.x);
}

}  // namespace

const char* instruction_set() { return chosen->name; }

void use_instruction_set(const char* name) {
  for (const Kernels& kernels : kKernels) {
    if (std::string(name) == kernels.name && kernels.runs_here()) {
      chosen = &kernels;
      return;
    }
  }
  throw std::invalid_argument(std::string("this processor or build has no instruction set ") +
                              name);
}

void field_forward_cpu(const FieldParams& p) {
  check(p);
  for_each_range(p, chosen->forward);
}

void field_backward_queries_cpu(const FieldParams& p) {
  check(p);
  for_each_range(p, chosen->backward_queries);
}

void field_backward_references_cpu(const FieldParams& p) {
  check(p);
  chosen->backward_references(p);
}

void prepare_references_cpu(const FieldParams& p) {
  check(p);
  if (!p.norms || !p.grid) {
    throw std::invalid_argument("prepare_references called with a null pointer");
  }
  chosen->prepare_references(p);
}

void field_finish_cpu(const FieldParams& p) {
  check_rows(p);
  chosen->finish(p);
}

void field_begin_cpu(const FieldParams& p) {
  check_rows(p);
  chosen->begin(p);
}

}  // namespace pfgm
