// SPDX-License-Identifier: Apache-2.0
// What the emulator tells the build that looks for races (races.cpp); elsewhere nothing.
#pragma once

#include <cstddef>

namespace emulation::races {

#if defined(PFGM_RACES)
void begin_launch();
void begin_block(const void* shared, size_t bytes);
void block_barrier();
void warp_barrier(int warp);
// A thread's copy that is on its way: until it has landed nobody may touch the bytes.
void copy_started(void* shared, const void* global, int bytes, const void* code);
void copy_landed(void* shared, size_t bytes);
void atomic(const void* location, size_t bytes, const void* code);
// Whether accesses are those of a kernel's thread.
void watch(bool on);
#else
inline void begin_launch() {}
inline void begin_block(const void*, size_t) {}
inline void block_barrier() {}
inline void warp_barrier(int) {}
inline void copy_started(void*, const void*, int, const void*) {}
inline void copy_landed(void*, size_t) {}
inline void atomic(const void*, size_t, const void*) {}
inline void watch(bool) {}
#endif

}  // namespace emulation::races
