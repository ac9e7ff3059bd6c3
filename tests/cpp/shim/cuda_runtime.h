// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: in place of CUDA's own header of this name it lets a
// C++ compiler take the sources in csrc/cuda.
//
// The threads of a block are fibers that run one after another. A barrier or a warp shuffle hands
// over to the next fiber, so that every thread gets there before any goes on, and a missing
// barrier shows: what the others have not written yet is read. Blocks run in order.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <vector>

#include "../../../csrc/poisson_field.h"

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};

inline dim3 blockDim, blockIdx, threadIdx;

namespace shim {

using Kernel = void (*)(pfgm::FieldParams);

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool finished;
};

inline std::vector<Fiber> fibers;
inline size_t current;
inline ucontext_t scheduler;
inline Kernel kernel;
inline pfgm::FieldParams params;

inline void hand_over() { swapcontext(&fibers[current].context, &scheduler); }

inline void run_thread() {
  kernel(params);
  fibers[current].finished = true;
}

inline void run_block() {
  fibers.resize(blockDim.x * blockDim.y);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.finished = false;
    makecontext(&fiber.context, run_thread, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (current = 0; current < fibers.size(); ++current) {
      if (fibers[current].finished) continue;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x);
      swapcontext(&scheduler, &fibers[current].context);
      running = true;
    }
  }
}

}  // namespace shim

inline void __syncthreads() { shim::hand_over(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static T slots[1024];
  slots[shim::current] = value;
  shim::hand_over();
  const T received = slots[shim::current ^ mask];
  shim::hand_over();
  return received;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t, cudaStream_t) {
  shim::kernel = reinterpret_cast<shim::Kernel>(const_cast<void*>(kernel));
  shim::params = *static_cast<const pfgm::FieldParams*>(arguments[0]);
  blockDim = block;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) shim::run_block();
  }
  return cudaSuccess;
}
