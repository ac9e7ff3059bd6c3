// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a block as fibers, blocks one after another.
#include "emulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

TensorCore tensor_core;
Schedule schedule;
Block block;
std::vector<Thread> threads;
std::map<const void*, long> launched;
Stacks* stacks;

namespace {

constexpr size_t kStaticLimit = 48 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;  // the sanitizer guards what lies behind
#else
constexpr size_t kGuardBytes = 256;
#endif
constexpr size_t kLastFrames = 4096;  // more than a thread's calls take when it exits
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;  // floats and doubles of 0xff are NaN

std::mutex one_launch;
std::map<const void*, size_t> allowed_shared;
Context host;
unsigned char* shared;

Thread& self() { return threads[block.current]; }
size_t warp_of(size_t thread) { return thread / kWarpSize; }

// While the emulator runs, accesses to memory are not the kernel's.
struct Unwatched {
  Unwatched() { races::watch(false); }
  ~Unwatched() { races::watch(true); }
};

void become(size_t thread) {
  block.current = thread;
  const unsigned index = static_cast<unsigned>(thread);
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
               index / blockDim.x / blockDim.y};
}

// Does not return; AddressSanitizer, were it told, would take the host's stack for this one.
void give_up() { switch_context(self().context, host); }

void hand_over() {
  Thread& from = self();
  const long next = next_thread();
  if (next < 0) {
    if (block.exited < block.size) block.error = "deadlock: " + describe_threads();
    give_up();
  }
  if (&threads[next] == &from) return;
  become(next);
  switch_context(from.context, threads[next].context);
}

void set_ready(size_t thread) {
  threads[thread].state = State::kReady;
  block.ready[warp_of(thread)] |= 1u << thread % kWarpSize;
}

void wait(State state, const Site& site) {
  self().state = state;
  self().site = site;
  block.ready[warp_of(block.current)] &= ~(1u << block.current % kWarpSize);
}

void thread_main() {
  races::watch(true);
  block.launch->run(block.launch->kernel, block.launch->arguments);
  races::watch(false);
  wait(State::kExited, {"exit", "", 0});
  ++block.exited;
  hand_over();
}

bool same(const Site& a, const Site& b) {
  const auto equal = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
  return a.line == b.line && equal(a.what, b.what) && equal(a.file, b.file);
}

// Whether all lanes of the mask wait where this thread does.
bool all_arrived(unsigned mask) {
  if (mask & ~block.collecting[warp_of(block.current)]) return false;
  const size_t first = block.current / kWarpSize * kWarpSize;
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const Thread& other = threads[first + static_cast<size_t>(__builtin_ctz(lanes))];
    if (other.mask != mask || !same(other.site, self().site)) return false;
  }
  return true;
}

// Hands what the lanes of the mask brought to each of them, and lets them go on.
void deliver(unsigned mask, size_t size) {
  const size_t warp = warp_of(block.current), first = warp * kWarpSize;
  // Another collective of the whole warp is complete only when all have read this one.
  const bool whole = mask == lanes_of_warp(warp);
  char* const all = block.all[warp].data();
  for (size_t lane = 0; whole && lane < kWarpSize && first + lane < block.size; ++lane) {
    std::memcpy(all + lane * size, threads[first + lane].brought, size);
  }
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const size_t lane = static_cast<size_t>(__builtin_ctz(lanes));
    Thread& thread = threads[first + lane];
    thread.received = whole ? all : thread.own;
    for (unsigned rest = whole ? 0 : mask; rest != 0; rest &= rest - 1) {
      const size_t other = static_cast<size_t>(__builtin_ctz(rest));
      std::memcpy(thread.own + other * size, threads[first + other].brought, size);
    }
    set_ready(first + lane);
  }
  block.collecting[warp] &= ~mask;
}

void collective(unsigned mask, const void* value, size_t size, const Site& site) {
  const size_t warp = warp_of(block.current);
  if (!(mask >> lane() & 1) || (mask & ~lanes_of_warp(warp)) != 0) {
    fail("%s at %s:%d, thread %zu: mask %08x lacks the caller or names lanes that do not exist",
         site.what, site.file, site.line, block.current, mask);
  }
  wait(State::kAtCollective, site);
  self().mask = mask;
  block.collecting[warp] |= 1u << lane();
  if (size > 0) std::memcpy(self().brought, value, size);
  if (all_arrived(mask)) {
    deliver(mask, size);
    if (size == 0 && mask == lanes_of_warp(warp)) races::warp_barrier(static_cast<int>(warp));
  }
  hand_over();
}

void perform(const Copy& copy) {
  auto* const target = static_cast<char*>(copy.shared);
  if (copy.bytes > 0) std::memcpy(target, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(target + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

// For AddressSanitizer: the functions that ran there have been left for good.
void forget_frames([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

void start_block(const dim3& index) {
  blockIdx = {index.x, index.y, index.z};
  const Launch& launch = *block.launch;
  std::memset(shared, kPoison, launch.shared_bytes);
  races::begin_block(shared, launch.shared_bytes);
  block.arrived = block.exited = 0;
  block.released = false;
  for (size_t i = 0; i < block.size; ++i) {
    threads[i].groups.assign(1, {});
    threads[i].mask = 0;
    forget_frames(stacks->top(i) - kLastFrames, kLastFrames);
    stacks->start(i, threads[i].context, thread_main);
    set_ready(i);
  }
  block.current = schedule.order == Order::kReverse ? 0 : block.size - 1;
}

[[noreturn]] void report(const std::string& error) {
  forget_frames(stacks->memory(), stacks->bytes());
  char place[100];
  std::snprintf(place, sizeof place, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  std::string name = block.launch->name;  // as __PRETTY_FUNCTION__ says: [with Arguments = …; …]
  name = name.substr(name.find("Arguments = ") + 12);
  throw std::runtime_error("emulation: kernel of " + name.substr(0, name.find_first_of(";]")) +
                           ", " + place + error);
}

void run_block(const dim3& index) {
  start_block(index);
  become(static_cast<size_t>(next_thread()));
  switch_context(host, self().context);
  if (block.error.empty()) {
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (shared[block.launch->shared_bytes + i] != kGuard) {
        block.error = "shared memory was written past its end, at byte " +
                      std::to_string(block.launch->shared_bytes + i);
      }
    }
  }
  if (!block.error.empty()) report(std::exchange(block.error, {}));
}

dim3 unflatten(uint64_t index, const dim3& grid) {
  return {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
          static_cast<unsigned>(index / grid.x / grid.y)};
}

void run_blocks(const dim3& grid) {
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kGreedy) {
    std::shuffle(order.begin(), order.end(), schedule.random);
  }
  for (const uint64_t index : order) run_block(unflatten(index, grid));
}

}  // namespace

unsigned lanes_of_warp(size_t warp) {
  const size_t lanes = std::min<size_t>(block.size - warp * kWarpSize, kWarpSize);
  return kFullMask >> (kWarpSize - lanes);
}

int lane() { return static_cast<int>(block.current % kWarpSize); }

void guard([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, static_cast<size_t>(bytes));
#endif
}

void fail(const char* format, ...) {
  races::watch(false);
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  block.error = text;
  give_up();
  std::abort();
}

void block_barrier(const Site& site) {
  const Unwatched unwatched;
  wait(State::kAtBarrier, site);
  if (++block.arrived == block.size) {
    for (const Thread& thread : threads) {
      if (&thread < &threads[block.size] && !same(thread.site, site)) {
        fail("divergence: %s", describe_threads().c_str());
      }
    }
    block.arrived = 0;
    block.released = true;
    for (size_t i = 0; i < block.size; ++i) set_ready(i);
    races::block_barrier();
  }
  hand_over();
}

void warp_barrier(unsigned mask, const Site& site) {
  const Unwatched unwatched;
  collective(mask, nullptr, 0, site);
}

const void* exchange(unsigned mask, const void* value, size_t size, const Site& site) {
  const Unwatched unwatched;
  collective(mask, value, size, site);
  return self().received;
}

void* shared_memory() { return shared; }

void check_shared(const void* pointer, size_t bytes, const char* what) {
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(shared);
  if (offset + bytes > block.launch->shared_bytes || offset > block.launch->shared_bytes) {
    fail("%s outside of shared memory, thread %zu", what, block.current);
  }
  if (offset % 16 != 0) fail("%s at an unaligned address, thread %zu", what, block.current);
}

void copy_async(void* target, const void* global, int bytes) {
  const Unwatched unwatched;
  check_shared(target, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes < 0 || bytes > 16) {
    fail("cp.async of %d bytes from %p, thread %zu", bytes, global, block.current);
  }
  races::copy_started(target, global, bytes, __builtin_return_address(0));
  const Copy copy{target, global, bytes};
  if (!schedule.late) perform(copy);
  self().groups.back().push_back(copy);
}

void copy_async_commit() {
  const Unwatched unwatched;
  self().groups.emplace_back();
}

void copy_async_wait(int pending) {
  const Unwatched unwatched;
  auto& groups = self().groups;
  const auto end = groups.end() - std::min<long>(pending + 1, static_cast<long>(groups.size()));
  for (auto group = groups.begin(); group != end; ++group) {
    for (const Copy& copy : *group) {
      if (schedule.late) perform(copy);
      races::copy_landed(copy.shared, 16);
    }
  }
  groups.erase(groups.begin(), end);
}

void note_atomic(const void* location, size_t bytes) {
  const Unwatched unwatched;
  races::atomic(location, bytes, __builtin_return_address(0));
}

int allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) return cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

int run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const dim3 grid = launch.grid, size = launch.block;
  block.size = size_t{size.x} * size.y * size.z;
  const auto allowed = allowed_shared.find(launch.kernel);
  const size_t limit =
      allowed == allowed_shared.end() ? kStaticLimit : std::max(allowed->second, kStaticLimit);
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || block.size == 0 || block.size > kMaxThreads || launch.shared_bytes > limit) {
    return cudaErrorInvalidConfiguration;
  }
  if (stacks == nullptr) {
    stacks = new Stacks(kMaxThreads);
    threads.resize(kMaxThreads);
  }
  ++launched[launch.kernel];
  block.launch = &launch;
  block.ready.assign((block.size + kWarpSize - 1) / kWarpSize, 0);
  block.collecting.assign(block.ready.size(), 0);
  block.all.assign(block.ready.size(), std::vector<char>(kMaxValue * kWarpSize));
  blockDim = size;
  gridDim = grid;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, launch.shared_bytes + kGuardBytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> release(memory, std::free);
  shared = static_cast<unsigned char*>(memory);
  std::memset(shared + launch.shared_bytes, kGuard, kGuardBytes);
  races::begin_launch();
  run_blocks(grid);
  return cudaSuccess;
}

}  // namespace emulation
