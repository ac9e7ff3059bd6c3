// SPDX-License-Identifier: Apache-2.0
// Instructions that C++ has no words for: the only file with PTX.
#pragma once

#include <cstdint>

namespace pfgm {
namespace {

// The block's dynamic shared memory, aligned to 128 bytes. Its first contents are undefined.
template <class T>
__device__ T* shared_memory();

// Copies 16 bytes to shared memory, those from `bytes` on as zeros, to be waited for; both addresses
// aligned to 16. commit closes a group of copies; wait returns when at most kPending of the latest
// groups of this thread are still on their way. Other threads see the bytes after a barrier.
__device__ void copy_async(void* shared, const void* global, int bytes = 16);
__device__ void copy_async_commit();
template <int kPending>
__device__ void copy_async_wait();

// ldmatrix .x4: four 8×8 matrices of 16-bit values, lane l giving the address in shared memory of
// row l % 8 of matrix l / 8 (16 bytes, aligned). `transposed` is .trans.
__device__ void load_matrices(uint32_t (&r)[4], const void* row);
__device__ void load_matrices_transposed(uint32_t (&r)[4], const void* row);

// c += a · b: mma.sync.m16n8k16 of bfloat16 with float sums.
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace
}  // namespace pfgm
