// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: in place of CUDA's own header of this name it lets a
// C++ compiler take the sources in csrc/cuda. The threads of a block are fibers (emulator.cpp).
//
// Stricter than a GPU where the programming guide leaves behaviour undefined: a barrier is reached
// by all threads of the block at one line, a warp's collective by all lanes of its mask at one
// line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "tensor_core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kMaxValue = 96;  // bytes that a lane can hand to the others
constexpr unsigned kFullMask = 0xffffffff;
inline int multiprocessors = 4;  // few, so that small problems have more tiles than these

// Where a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

void block_barrier(const Site& site);
void warp_barrier(unsigned mask, const Site& site);
// The values that the lanes of the mask brought to the same place, by lane.
const void* exchange(unsigned mask, const void* value, size_t size, const Site& site);
int lane();
// Memory that no kernel may touch: AddressSanitizer sees to it.
void guard(void* begin, int64_t bytes);

template <class T>
const T* exchange(unsigned mask, const T& value, const Site& site) {
  static_assert(sizeof(T) <= kMaxValue && std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(exchange(mask, &value, sizeof(T), site));
}

// The value of lane `source`, which has to be in the mask.
template <class T>
T from_lane(unsigned mask, const T& value, int source, const Site& site);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

extern TensorCore tensor_core;  // of the GPU

void* shared_memory();
// Fails unless the bytes are the block's shared memory and aligned to 16.
void check_shared(const void* pointer, size_t bytes, const char* what);
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// A location that several threads change: known to the build that looks for races.
void note_atomic(const void* location, size_t bytes);

// The calls of a kernel, so that emulator.cpp need not know its arguments.
struct Launch {
  const char* name;
  const void* kernel;
  void (*run)(const void* kernel, const void* arguments);
  const void* arguments;
  dim3 grid, block;
  size_t shared_bytes;
};
int run(const Launch& launch);
int allow_shared(const void* kernel, size_t bytes);

template <class Arguments>
void call(const void* kernel, const void* arguments) {
  reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(kernel))(
      *static_cast<const Arguments*>(arguments));
}

template <class Kernel>
const void* address(Kernel kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace emulation

#define PFGM_SITE(what) \
  emulation::Site { what, file, line }
#define PFGM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PFGM_CALLER) { emulation::block_barrier(PFGM_SITE("__syncthreads")); }

inline void __syncwarp(unsigned mask = emulation::kFullMask, PFGM_CALLER) {
  emulation::warp_barrier(mask, PFGM_SITE("__syncwarp"));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PFGM_CALLER) {
  const int base = emulation::lane() / width * width;
  const int from = base + (source & (width - 1));
  return emulation::from_lane(mask, value, from, PFGM_SITE("__shfl_sync"));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, PFGM_CALLER) {
  const int self = emulation::lane(), other = self ^ bits;
  const int from = other / width > self / width ? self : other;
  return emulation::from_lane(mask, value, from, PFGM_SITE("__shfl_xor_sync"));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PFGM_CALLER) {
  const int self = emulation::lane(), other = self + static_cast<int>(delta);
  const int from = other / width == self / width ? other : self;
  return emulation::from_lane(mask, value, from, PFGM_SITE("__shfl_down_sync"));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PFGM_CALLER) {
  const int self = emulation::lane(), other = self - static_cast<int>(delta);
  const int from = other >= self / width * width ? other : self;
  return emulation::from_lane(mask, value, from, PFGM_SITE("__shfl_up_sync"));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PFGM_CALLER) {
  const int* all = emulation::exchange(mask, predicate, PFGM_SITE("__ballot_sync"));
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>((mask >> i & 1) && all[i]) << i;
  return result;
}

inline int __any_sync(unsigned mask, int predicate, PFGM_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, PFGM_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

inline unsigned __activemask() { return emulation::kFullMask; }

#undef PFGM_SITE
#undef PFGM_CALLER

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
inline float rsqrt(float v) { return rsqrtf(v); }

namespace emulation {

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using Same = typename Identity<T>::type;  // not deduced: converts

// Fibers change hands only at barriers and collectives: a plain update is atomic.
template <class T, class Update>
T atomic(T* location, Update update) {
  static_assert(std::is_integral_v<T>, "the order of float additions would show");
  note_atomic(location, sizeof(T));
  const T former = __atomic_load_n(location, __ATOMIC_RELAXED);
  __atomic_store_n(location, update(former), __ATOMIC_RELAXED);
  return former;
}

}  // namespace emulation

inline unsigned __float_as_uint(float v) { return emulation::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulation::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulation::bits<float>(v); }
inline float __int_as_float(int v) { return emulation::bits<float>(v); }
inline long long __double_as_longlong(double v) { return emulation::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emulation::bits<double>(v); }

template <class T>
T atomicAdd(T* location, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T v) { return static_cast<T>(v + value); });
}
template <class T>
T atomicMax(T* location, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T v) { return v < value ? value : v; });
}
template <class T>
T atomicMin(T* location, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T v) { return value < v ? value : v; });
}
template <class T>
T atomicOr(T* location, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T v) { return static_cast<T>(v | value); });
}
template <class T>
T atomicExch(T* location, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* location, emulation::Same<T> compare, emulation::Same<T> value) {
  return emulation::atomic(location, [=](T v) { return v == compare ? value : v; });
}

template <class T>
T emulation::from_lane(unsigned mask, const T& value, int source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  const T* all = exchange(mask, value, site);
  if (source < 0 || source >= kWarpSize || !(mask >> source & 1)) {
    fail("%s at %s:%d reads lane %d, which mask %08x does not name", site.what, site.file,
         site.line, source, mask);
  }
  return all[source];
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess             ? "no error"
         : status == cudaErrorInvalidValue ? "invalid argument"
                                           : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <class T>
cudaError_t cudaMallocManaged(T** pointer, size_t bytes) {
  return *pointer = static_cast<T*>(std::malloc(bytes)), cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::multiprocessors, cudaSuccess;
}

template <class Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments), cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(
      emulation::allow_shared(emulation::address(kernel), static_cast<size_t>(bytes)));
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return static_cast<cudaError_t>(
      emulation::run({__PRETTY_FUNCTION__, emulation::address(kernel), emulation::call<Arguments>,
                      arguments[0], grid, block, shared_bytes}));
}
