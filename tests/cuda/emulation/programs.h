// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace pfgm {

enum Mistake {
  kNone,
  kNoBarrier,
  kNoTrailingBarrier,
  kNoWait,
  kLateWait,  // one group too few has arrived
  kNoCommit,
  kEarlyFetch,  // into the stage that others still read
  kNotAllLanes,
  kOtherMask,
  kBarrierInBranch,
  kTwoBarriers,
  kSharedOverrun,
  kGlobalOverrun,
  kWorkspaceOverrun,
  kUninitialised,
  kTwoBlocks,  // write the same
};

void run_program(const std::string& name, int mistake, const float* in, float* out);
void run_check(const std::string& name);
std::string describe();

}  // namespace pfgm
