// SPDX-License-Identifier: Apache-2.0
// Finds races: a byte that one thread writes and another touches with no barrier between. The
// kernels are compiled with the instrumentation of ThreadSanitizer, which calls the hooks at the
// end for each access; the sanitizer itself, which knows nothing of barriers, is not linked.
//
// Shared memory is compared within a block, global memory within a launch, where blocks have no
// order. Threads of one warp are ordered by __syncwarp of the whole warp too, but by no shuffle,
// vote or mma: these promise no order of memory.
#if defined(PFGM_RACES)
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulator.h"

extern "C" const char __ehdr_start, _end;  // of this library

namespace emulation::races {
namespace {

enum class Kind { kRead, kWrite, kAtomic, kCopy };

// Epochs are the spans between barriers of a block, numbered through all blocks of all launches.
struct Access {
  uint32_t epoch = 0;
  uint32_t warp_epoch : 20;  // between barriers of the warp
  uint32_t thread : 10;
  uint32_t atomic : 1;
  uint32_t pending : 1;  // a copy on its way
  uint32_t code;         // address within the library
};

// What is remembered of a byte. A write conflicts with a read of another thread of the warp or of
// another warp: `latest` and one of each kind suffice.
struct Shadow {
  Access write, latest, same_warp, other_warp;
};

constexpr uintptr_t kPage = 4096;
using Page = Shadow[kPage];
constexpr size_t kMaxPages = 512;  // that outlive a launch

bool watching;
uint32_t epoch, block_start, launch_start;
uint32_t warp_epochs[kMaxThreads / kWarpSize];
uintptr_t shared_begin, shared_bytes;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number;
Shadow* last_page;

Shadow& shadow_of(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (last_page == nullptr || number != last_number) {
    auto& page = pages[number];
    if (page == nullptr) page.reset(reinterpret_cast<Page*>(new Page()));
    last_number = number;
    last_page = *page;
  }
  return last_page[address % kPage];
}

uint32_t warp_of(uint32_t thread) { return thread / kWarpSize; }
bool in_block(const Access& access) { return access.epoch >= block_start; }

bool conflict(const Access& former, const Access& now, uint32_t oldest) {
  if (former.epoch < oldest || (former.atomic && now.atomic)) return false;
  if (!in_block(former) || former.pending) return true;
  if (former.thread == now.thread || former.epoch != now.epoch) return false;
  return warp_of(former.thread) != warp_of(now.thread) || former.warp_epoch == now.warp_epoch;
}

void remember_read(Shadow& byte, const Access& now) {
  const Access former = byte.latest;
  byte.latest = now;
  if (former.epoch == 0 || (in_block(former) && former.thread == now.thread)) return;
  const bool same_warp = in_block(former) && warp_of(former.thread) == warp_of(now.thread);
  (same_warp ? byte.same_warp : byte.other_warp) = former;
}

// "file:line", and where that was inlined from.
std::string line_of(uint32_t code) {
  Dl_info info;
  dladdr(&__ehdr_start, &info);
  char command[600], line[300];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x", info.dli_fname, code - 1);
  std::string text;
  FILE* const pipe = popen(command, "r");
  while (pipe != nullptr && std::fgets(line, sizeof line, pipe) != nullptr) {
    const std::string place(line);
    const size_t name = place.rfind('/') + 1;
    text +=
        (text.empty() ? "" : " < ") + place.substr(name, place.find_first_of(" \n", name) - name);
  }
  if (pipe != nullptr) pclose(pipe);
  return text;
}

[[noreturn]] void report(const Access& former, bool former_writes, const Access& now, Kind kind,
                         uintptr_t address) {
  const bool shared = address - shared_begin < shared_bytes;
  const std::string place = shared ? "byte " + std::to_string(address - shared_begin) + " of shared"
                                   : std::string("global");
  const char* const before = former.pending  ? "has a copy on its way to"
                             : former_writes ? "wrote"
                                             : "read";
  const char* const after = kind == Kind::kRead   ? "reads"
                            : kind == Kind::kCopy ? "copies to"
                                                  : "writes";
  fail("race: thread %u%s %s %s memory (%s); thread %u %s it (%s)", former.thread,
       in_block(former) ? "" : " of another block", before, place.c_str(),
       line_of(former.code).c_str(), now.thread, after, line_of(now.code).c_str());
}

Access access_now(const void* code) {
  Access now;
  now.epoch = epoch;
  now.thread = static_cast<uint32_t>(block.current);
  now.warp_epoch = warp_epochs[warp_of(now.thread)];
  now.atomic = now.pending = 0;
  now.code = static_cast<uint32_t>(static_cast<const char*>(code) - &__ehdr_start);
  return now;
}

bool exempt(uintptr_t address) {
  const auto image = reinterpret_cast<uintptr_t>(&__ehdr_start);
  return stacks->holds(address) || address - image < reinterpret_cast<uintptr_t>(&_end) - image;
}

void touch(const void* pointer, size_t bytes, Kind kind, const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (exempt(address)) return;
  const uint32_t oldest = address - shared_begin < shared_bytes ? block_start : launch_start;
  Access now = access_now(code);
  now.atomic = kind == Kind::kAtomic;
  now.pending = kind == Kind::kCopy;
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kPage + 1) * kPage);
    for (Shadow* byte = &shadow_of(at); at < end; ++at, ++byte) {
      if (conflict(byte->write, now, oldest)) report(byte->write, true, now, kind, at);
      if (kind == Kind::kRead) {
        remember_read(*byte, now);
        continue;
      }
      for (const Access* read : {&byte->latest, &byte->same_warp, &byte->other_warp}) {
        if (conflict(*read, now, oldest)) report(*read, false, now, kind, at);
      }
      byte->write = now;
    }
  }
}

void hook(const void* pointer, size_t bytes, Kind kind, const void* code) {
  if (!watching) return;
  watching = false;
  touch(pointer, bytes, kind, code);
  watching = true;
}

}  // namespace

void watch(bool on) { watching = on; }

void begin_launch() {
  launch_start = epoch + 1;
  if (pages.size() > kMaxPages) pages.clear();
  last_page = nullptr;
}

void begin_block(const void* shared, size_t bytes) {
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_bytes = bytes;
  block_barrier();
  block_start = epoch;
}

void block_barrier() {
  ++epoch;
  for (uint32_t& warp_epoch : warp_epochs) warp_epoch = 0;
}

void warp_barrier(int warp) { ++warp_epochs[warp]; }

void copy_started(void* shared, const void* global, int bytes, const void* code) {
  touch(global, static_cast<size_t>(bytes), Kind::kRead, code);
  touch(shared, 16, Kind::kCopy, code);
}

void copy_landed(void* shared, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(shared);
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Access& write = shadow_of(at).write;
    const uint32_t code = write.code;
    write = access_now(nullptr);
    write.code = code;
  }
}

void atomic(const void* location, size_t bytes, const void* code) {
  touch(location, bytes, Kind::kAtomic, code);
}

}  // namespace emulation::races

using emulation::races::hook;
using emulation::races::Kind;

#define PFGM_HOOKS(size)                                                                         \
  void __tsan_read##size(void* p) { hook(p, size, Kind::kRead, __builtin_return_address(0)); }   \
  void __tsan_write##size(void* p) { hook(p, size, Kind::kWrite, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) {                                                    \
    hook(p, size, Kind::kRead, __builtin_return_address(0));                                     \
  }                                                                                              \
  void __tsan_unaligned_write##size(void* p) {                                                   \
    hook(p, size, Kind::kWrite, __builtin_return_address(0));                                    \
  }

extern "C" {
PFGM_HOOKS(1)
PFGM_HOOKS(2)
PFGM_HOOKS(4)
PFGM_HOOKS(8)
PFGM_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  hook(p, bytes, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  hook(p, bytes, Kind::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Of emulation::atomic, which has told what it does, and of the guards of static variables.
uint8_t __tsan_atomic8_load(const uint8_t* p, int) { return *p; }
uint32_t __tsan_atomic32_load(const uint32_t* p, int) { return *p; }
uint64_t __tsan_atomic64_load(const uint64_t* p, int) { return *p; }
void __tsan_atomic32_store(uint32_t* p, uint32_t v, int) { *p = v; }
void __tsan_atomic64_store(uint64_t* p, uint64_t v, int) { *p = v; }
}
#endif
