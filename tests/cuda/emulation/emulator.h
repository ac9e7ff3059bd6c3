// SPDX-License-Identifier: Apache-2.0
// What the parts of the emulator share.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulation {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 << 10;  // of a block on sm_86, sm_89 and sm_120, the smallest

// In which order threads run. Every order is one that a GPU may choose.
enum class Order {
  kForward,  // each thread up to where it has to wait, round the block
  kReverse,
  kGreedy,  // a random warp as far as it can before another gets a turn
};

struct Schedule {
  Order order = Order::kForward;
  bool late = false;  // copy_async delivers when waited for, not at once
  std::mt19937_64 random{0};
};

enum class State { kReady, kAtBarrier, kAtCollective, kExited };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

struct Thread {
  Context context;
  State state;
  Site site;
  unsigned mask;
  const void* received;
  std::vector<std::vector<Copy>> groups;  // of copies on their way; the last one is open
  alignas(16) char brought[kMaxValue];
  alignas(16) char own[kMaxValue * kWarpSize];
};

struct Block {
  const Launch* launch;
  size_t size;                         // threads
  size_t current;                      // thread that runs
  std::vector<unsigned> ready;         // lanes, by warp
  std::vector<unsigned> collecting;    // lanes that wait at a collective
  std::vector<std::vector<char>> all;  // what a collective of a full warp handed out
  size_t arrived, exited;
  bool released;  // a barrier has just been reached by all
  std::string error;
};

extern Schedule schedule;
extern Block block;
extern std::vector<Thread> threads;
extern std::map<const void*, long> launched;  // kernels and how often they ran
extern Stacks* stacks;

// The thread that runs next, or a negative number where all wait.
long next_thread();
unsigned lanes_of_warp(size_t warp);
std::string describe_threads();

}  // namespace emulation
