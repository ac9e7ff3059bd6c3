// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks that one thread of the operating system runs in turn.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)
// swapcontext would do, but asks the kernel for the signal mask each time.
using Context = void*;

extern "C" void pfgm_switch_stacks(void** from, void* to);
asm(R"(
.text
.type pfgm_switch_stacks, @function
pfgm_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pfgm_switch_stacks, .-pfgm_switch_stacks
)");

inline void start_at(Context& context, char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // where `entry`, which never returns, would return to
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
inline void switch_context(Context& from, Context& to) { pfgm_switch_stacks(&from, to); }
#else
using Context = ucontext_t;

inline void start_at(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// Stacks of fibers, each above a page that nobody may touch.
class Stacks {
 public:
  static constexpr size_t kSize = 256 << 10, kGuard = 4096;

  explicit Stacks(size_t count) : bytes_(count * kSize) {
    void* const memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kSize, kGuard, PROT_NONE);
  }

  void start(size_t index, Context& context, void (*entry)()) {
    start_at(context, memory_ + index * kSize + kGuard, kSize - kGuard, entry);
  }
  bool holds(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(memory_) < bytes_;
  }
  char* top(size_t index) const { return memory_ + (index + 1) * kSize; }
  void* memory() const { return memory_; }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_;
};

}  // namespace emulation
