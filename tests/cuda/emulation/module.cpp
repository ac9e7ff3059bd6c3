// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda on the emulator, as a Python module.
#include "../../../csrc/arguments.h"
#include "control.h"

PYBIND11_MODULE(PFGM_MODULE, module) {
  pfgm::define<&pfgm::field_forward_cuda>(module, "field_forward_cuda");
  pfgm::define<&pfgm::field_backward_cuda>(module, "field_backward_cuda");
  pfgm::define<&pfgm::prepare_references_cuda>(module, "prepare_references_cuda");
  pfgm::define<&pfgm::field_finish_cuda>(module, "field_finish_cuda");
  pfgm::define<&pfgm::field_begin_cuda>(module, "field_begin_cuda");
  emulation::define_controls(module);
}
