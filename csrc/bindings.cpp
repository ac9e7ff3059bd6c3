// SPDX-License-Identifier: Apache-2.0
// The Python module _C.
#include "arguments.h"

PYBIND11_MODULE(_C, module) {
  using pfgm::define;
  define<pfgm::field_forward_cpu>(module, "field_forward_cpu");
  define<pfgm::field_backward_queries_cpu>(module, "field_backward_queries_cpu");
  define<pfgm::field_backward_references_cpu>(module, "field_backward_references_cpu");
  define<pfgm::prepare_references_cpu>(module, "prepare_references_cpu");
  define<pfgm::field_finish_cpu>(module, "field_finish_cpu");
  define<pfgm::field_begin_cpu>(module, "field_begin_cpu");
  module.def("use_instruction_set", pfgm::use_instruction_set);
#ifdef PFGM_CUDA_ARCHS
  define<pfgm::field_forward_cuda>(module, "field_forward_cuda");
  define<pfgm::field_backward_cuda>(module, "field_backward_cuda");
  define<pfgm::prepare_references_cuda>(module, "prepare_references_cuda");
  define<pfgm::field_finish_cuda>(module, "field_finish_cuda");
  define<pfgm::field_begin_cuda>(module, "field_begin_cuda");
  module.def("cuda_unavailable", pfgm::cuda_unavailable);
#endif
  module.def("build_info", [] {
    pybind11::dict info;
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "g++ " __VERSION__;
#endif
    info["instruction set"] = pfgm::instruction_set();
#ifdef PFGM_CUDA_ARCHS
    info["CUDA"] = PFGM_CUDA_VERSION;
    info["architectures"] = PFGM_CUDA_ARCHS;
#else
    info["CUDA"] = "none";
#endif
    return info;
  });
}
