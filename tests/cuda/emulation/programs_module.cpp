// SPDX-License-Identifier: Apache-2.0
// programs.cu as a Python module.
#include "control.h"
#include "programs.h"

PYBIND11_MODULE(PFGM_MODULE, module) {
  namespace py = pybind11;
  using namespace pfgm;
  py::enum_<Mistake>(module, "Mistake", py::module_local())
      .value("none", kNone)
      .value("no_barrier", kNoBarrier)
      .value("no_trailing_barrier", kNoTrailingBarrier)
      .value("no_wait", kNoWait)
      .value("late_wait", kLateWait)
      .value("no_commit", kNoCommit)
      .value("early_fetch", kEarlyFetch)
      .value("not_all_lanes", kNotAllLanes)
      .value("other_mask", kOtherMask)
      .value("barrier_in_branch", kBarrierInBranch)
      .value("two_barriers", kTwoBarriers)
      .value("shared_overrun", kSharedOverrun)
      .value("global_overrun", kGlobalOverrun)
      .value("workspace_overrun", kWorkspaceOverrun)
      .value("uninitialised", kUninitialised)
      .value("two_blocks", kTwoBlocks);
  module.def("run_program", [](const std::string& name, Mistake mistake, std::uintptr_t in,
                               std::uintptr_t out) {
    run_program(name, mistake, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out));
  });
  module.def("run_check", &run_check);
  module.def("describe_tensor_core", &describe);
  emulation::define_controls(module);
}
