// SPDX-License-Identifier: Apache-2.0
// Instructions that C++ has no words for: the only file with PTX. Beside each stands what it does
// as C++ for a host that runs a block's threads as fibers (tests/cuda/emulation).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pfgm {
namespace {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// The block's dynamic shared memory, aligned to 128 bytes. Its first contents are undefined.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
#else
  return static_cast<T*>(emulation::shared_memory());
#endif
}

// 1/√v to a unit in the last place or two, in one instruction, for v that is no denormal.
__device__ __forceinline__ float reciprocal_root(float v) {
#if defined(__CUDACC__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return 1 / std::sqrt(v);
#endif
}

// Copies 16 bytes to shared memory, those from `bytes` on as zeros, to be waited for; both
// addresses aligned to 16. commit closes a group of copies; wait returns when at most kPending of
// the latest groups of this thread are still on their way. Other threads see the bytes after a
// barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
#else
  emulation::copy_async(shared, global, bytes);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_async_commit();
#endif
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::copy_async_wait(kPending);
#endif
}

#if !defined(__CUDACC__)
// What a lane gets of 8×8 matrices: of matrix i in register i the elements (row, column) and, in
// the upper half, (row, column + 1), or of its transpose.
template <bool kTransposed>
void load_fragments(uint32_t (&r)[4], const void* row) {
  emulation::check_shared(row, 16, "ldmatrix");
  const auto* rows =
      emulation::exchange(emulation::kFullMask, row, {"ldmatrix", __FILE__, __LINE__});
  const int lane = emulation::lane(), first = lane / 4, second = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const int matrix_row = kTransposed ? second + half : first;
      const int column = kTransposed ? first : second + half;
      const uint16_t element = static_cast<const uint16_t*>(rows[8 * i + matrix_row])[column];
      r[i] |= static_cast<uint32_t>(element) << (16 * half);
    }
  }
}
#endif

// ldmatrix .x4: four 8×8 matrices of 16-bit values, lane l giving the address in shared memory of
// row l % 8 of matrix l / 8 (16 bytes, aligned). `transposed` is .trans.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  load_fragments<false>(r, row);
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  load_fragments<true>(r, row);
#endif
}

#if !defined(__CUDACC__)
struct Fragments {
  emulation::Factor a[8], b[4];
};

// The two bfloat16 values of each register.
template <int kRegisters>
void widen(const uint32_t (&registers)[kRegisters], emulation::Factor* values) {
  for (int i = 0; i < kRegisters; ++i) {
    values[2 * i] = emulation::Factor(__uint_as_float(registers[i] << 16));
    values[2 * i + 1] = emulation::Factor(__uint_as_float(registers[i] & 0xffff0000));
  }
}

// Lane 4g + q holds c at rows g (0, 1) and g + 8 (2, 3), columns 2q and 2q + 1; a in register
// 2·(k / 8) + (row / 8) at row g (or g + 8), k = 2q, 2q + 1 modulo 8; b in register k / 8 at column
// g, the same k.
__attribute__((no_sanitize("thread"))) inline void multiply_fragments(float (&c)[4],
                                                                      const Fragments& own) {
  const Fragments* all =
      emulation::exchange(emulation::kFullMask, own, {"mma.sync", __FILE__, __LINE__});
  const Fragments* const rows = all + emulation::lane() / 4 * 4;
  const Fragments* const columns = all + emulation::lane() % 4 * 8;
  float products[16][4];
  int exponents[16][4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int k = j / 2 * 8 + 2 * q + j % 2;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const emulation::Factor a = rows[q].a[j / 2 * 4 + i / 2 * 2 + j % 2];
        const emulation::Factor b = columns[i % 2 * 4 + q].b[j];
        products[k][i] = a.value * b.value;
        exponents[k][i] = a.exponent + b.exponent;
      }
    }
  }
  emulation::add_products<4>(
      emulation::tensor_core, 16, [&](int k, int i) { return products[k][i]; },
      [&](int k, int i) { return exponents[k][i]; }, c);
}
#endif

// c += a · b: mma.sync.m16n8k16 of bfloat16 with float sums.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  Fragments own;
  widen(a, own.a);
  widen(b, own.b);
  multiply_fragments(c, own);
#endif
}

}  // namespace
}  // namespace pfgm
