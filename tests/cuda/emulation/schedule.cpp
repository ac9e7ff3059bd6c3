// SPDX-License-Identifier: Apache-2.0
// Which thread runs next, and what to say where none can.
#include <utility>

#include "emulator.h"

namespace emulation {
namespace {

// The first ready thread from `from` on, upwards round the block.
long forward(size_t from) {
  const size_t warps = block.ready.size();
  for (size_t i = 0; i <= warps; ++i) {
    const size_t warp = (from / kWarpSize + i) % warps;
    unsigned lanes = block.ready[warp];
    if (i == 0) lanes &= kFullMask << from % kWarpSize;
    if (lanes != 0) return static_cast<long>(warp * kWarpSize) + __builtin_ctz(lanes);
  }
  return -1;
}

long reverse(size_t from) {
  const size_t warps = block.ready.size();
  for (size_t i = 0; i <= warps; ++i) {
    const size_t warp = (from / kWarpSize + warps - i % warps) % warps;
    unsigned lanes = block.ready[warp];
    if (i == 0) lanes &= kFullMask >> (kWarpSize - 1 - from % kWarpSize);
    if (lanes != 0) return static_cast<long>(warp * kWarpSize) + 31 - __builtin_clz(lanes);
  }
  return -1;
}

// Another lane of the same warp, or where all of them wait a warp at random.
long greedy() {
  const size_t current = block.current / kWarpSize;
  unsigned lanes = std::exchange(block.released, false) ? 0 : block.ready[current];
  size_t warp = current;
  if (lanes == 0) {
    const size_t warps = block.ready.size(), start = schedule.random() % warps;
    for (size_t i = 0; i < warps && lanes == 0; ++i) {
      warp = (start + i) % warps;
      lanes = block.ready[warp];
    }
    if (lanes == 0) return -1;
  }
  const int lane = schedule.random() % 2 ? __builtin_ctz(lanes) : 31 - __builtin_clz(lanes);
  return static_cast<long>(warp * kWarpSize) + lane;
}

}  // namespace

long next_thread() {
  switch (schedule.order) {
    case Order::kForward:
      return forward((block.current + 1) % block.size);
    case Order::kReverse:
      return reverse((block.current + block.size - 1) % block.size);
    default:
      return greedy();
  }
}

std::string describe_threads() {
  std::string text;
  const auto same = [](const Thread& a, const Thread& b) {
    return a.state == b.state && a.site.line == b.site.line && a.site.what == b.site.what &&
           a.mask == b.mask;
  };
  for (size_t first = 0, end; first < block.size; first = end) {
    const Thread& thread = threads[first];
    for (end = first + 1; end < block.size && same(threads[end], thread); ++end) continue;
    text += (first == 0 ? "threads " : "; ") + std::to_string(first) + "-" +
            std::to_string(end - 1) +
            (thread.state == State::kExited  ? " have exited"
             : thread.state == State::kReady ? " run"
                                             : " wait at ");
    if (thread.state != State::kAtBarrier && thread.state != State::kAtCollective) continue;
    const std::string file = thread.site.file;
    text += std::string(thread.site.what) + " in " + file.substr(file.rfind('/') + 1) + ":" +
            std::to_string(thread.site.line);
  }
  return text;
}

}  // namespace emulation
