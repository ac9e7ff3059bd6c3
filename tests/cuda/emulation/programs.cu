// SPDX-License-Identifier: Apache-2.0
// Programs that the emulator is tested with: right ones, and the same with a mistake.
#include <vector>

#include "../../../csrc/cuda/intrinsics.cuh"
#include "../../../csrc/cuda/launch.cuh"
#include "checks.cuh"
#include "programs.h"

namespace pfgm {
namespace {

constexpr int kThreads = 128, kTiles = 6, kStages = 3;
constexpr int kBlocks = 2;

struct ProgramArguments {
  FieldParams p;
  const float* in;  // (kTiles, kThreads)
  float* out;       // (kBlocks, kThreads)
  float* piece;     // of the workspace, (kBlocks, kThreads)
  int mistake;
};

// Each thread adds what its neighbour in another warp has written, tile after tile.

__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ ProgramArguments a) {
  float* const memory = shared_memory<float>();
  const int self = threadIdx.x, other = (self + 45) % kThreads;
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    memory[self] = a.in[tile * kThreads + self];
    if (a.mistake != kNoBarrier) __syncthreads();
    sum += memory[other];
    if (a.mistake != kNoTrailingBarrier) __syncthreads();
  }
  a.out[blockIdx.x * kThreads + self] = sum;
}

// The same with the tiles copied asynchronously, kStages − 1 of them ahead.
__global__ void __launch_bounds__(kThreads)
    pipeline_kernel(const __grid_constant__ ProgramArguments a) {
  float* const memory = shared_memory<float>();
  const int self = threadIdx.x, other = (self + 45) % kThreads;
  const auto fetch = [&](int tile) {
    if (tile < kTiles && self < kThreads / 4) {
      copy_async(memory + tile % kStages * kThreads + 4 * self, a.in + tile * kThreads + 4 * self);
    }
    if (a.mistake != kNoCommit) copy_async_commit();
  };
  float sum = 0;
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (a.mistake == kLateWait) {
      copy_async_wait<kStages - 1>();
    } else if (a.mistake != kNoWait) {
      copy_async_wait<kStages - 2>();
    }
    if (a.mistake != kNoBarrier) __syncthreads();
    if (a.mistake != kEarlyFetch) fetch(tile + kStages - 1);
    sum += memory[tile % kStages * kThreads + other];
    if (a.mistake == kEarlyFetch) fetch(tile + kStages);
  }
  a.out[blockIdx.x * kThreads + self] = sum;
}

// Sums over the warp, by memory and by shuffles.
__global__ void __launch_bounds__(kThreads)
    warp_kernel(const __grid_constant__ ProgramArguments a) {
  float* const memory = shared_memory<float>();
  const int self = threadIdx.x, lane = self % 32;
  memory[self] = a.in[self];
  if (a.mistake != kNoBarrier) __syncwarp();
  float sum = memory[self ^ 1];
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (a.mistake == kNotAllLanes && lane == 7) return;
  if (lane < 16 || a.mistake != kOtherMask) {
    for (int i = 8; i > 0; i /= 2) sum += __shfl_xor_sync(half, sum, i);
  } else {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  }
  if (a.mistake == kBarrierInBranch && lane < 16) __syncthreads();
  if (a.mistake == kTwoBarriers) {
    if (lane < 16) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  a.out[blockIdx.x * kThreads + self] = __shfl_sync(0xffffffffu, sum, lane < 16 ? 0 : 16);
}

// Steps over the end of something.
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const __grid_constant__ ProgramArguments a) {
  float* const memory = shared_memory<float>();
  const int self = threadIdx.x;
  memory[self + (a.mistake == kSharedOverrun ? 1 : 0)] = 1;
  __syncthreads();
  const int next = self + (a.mistake == kGlobalOverrun ? kTiles * kThreads - kThreads + 1 : 0);
  const int uninitialised = a.mistake == kUninitialised ? kThreads : 0;
  const int block = a.mistake == kTwoBlocks ? 0 : blockIdx.x * kThreads;
  const int beyond = a.mistake == kWorkspaceOverrun ? 1 : 0;
  a.piece[blockIdx.x * kThreads + self + beyond] = 1;
  a.out[block + self] = a.in[next] + memory[self + uninitialised];
}

}  // namespace

void run_program(const std::string& name, int mistake, const float* in, float* out) {
  ProgramArguments arguments{};
  std::vector<char> memory(2048);
  arguments.p.workspace = memory.data();
  arguments.piece = Workspace(arguments.p).take<float>(kBlocks * kThreads);
  arguments.in = in;
  arguments.out = out;
  arguments.mistake = mistake;
  const bool bounds = name == "bounds";
  const auto kernel = name == "exchange"   ? exchange_kernel
                      : name == "pipeline" ? pipeline_kernel
                      : name == "warp"     ? warp_kernel
                                           : bounds_kernel;
  const int rows = name == "pipeline" ? kStages : bounds && mistake == kUninitialised ? 2 : 1;
  launch(kernel, kBlocks, kThreads, rows * kThreads * sizeof(float), arguments);
}

void run_check(const std::string& name) {
  if (name == "multiply") return check_multiply();
  if (name == "load") return check_load(false);
  if (name == "load transposed") return check_load(true);
  if (name == "product") return check_product(false);
  if (name == "product transposed") return check_product(true);
  if (name == "copy") return check_copy();
  throw std::invalid_argument("no check " + name);
}

std::string describe() { return describe_tensor_core(); }

}  // namespace pfgm
