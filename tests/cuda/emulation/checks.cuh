// SPDX-License-Identifier: Apache-2.0
// Each function of intrinsics.cuh against what the PTX manual says of its instruction. On a GPU
// (device_check.cu) these are checks of the device version, on the emulator of the host version.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "../../../csrc/cuda/intrinsics.cuh"

namespace pfgm {
namespace {

constexpr int kLanes = 32;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// Memory that both the host and the device see.
template <class T>
class Managed {
 public:
  explicit Managed(int size) {
    require(cudaMallocManaged(&data_, size * sizeof(T)) == cudaSuccess, "no managed memory");
  }
  ~Managed() { cudaFree(data_); }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  T& operator[](int i) { return data_[i]; }
  T* data() { return data_; }

 private:
  T* data_ = nullptr;
};

template <class Arguments>
void run_warp(void (*kernel)(Arguments), Arguments arguments, size_t shared_bytes) {
  void* pointers[] = {&arguments};
  require(cudaLaunchKernel(kernel, dim3(1), dim3(kLanes), pointers, shared_bytes, nullptr) ==
                  cudaSuccess &&
              cudaDeviceSynchronize() == cudaSuccess,
          "the kernel did not run");
}

// Small whole numbers, which bfloat16 holds and float sums exactly; no two near ones are alike.
inline float number(int i) { return static_cast<float>((i * 37 + i / 7 * 11) % 97 - 48); }

inline uint32_t bfloat16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits >> 16;
}

struct MultiplyArguments {
  const uint32_t *a, *b;  // (32, 4), (32, 2)
  float* c;               // (32, 4)
};

__global__ void multiply_kernel(const __grid_constant__ MultiplyArguments p) {
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) c[i] = p.c[threadIdx.x * 4 + i];
  multiply(c, a, b);
  for (int i = 0; i < 4; ++i) p.c[threadIdx.x * 4 + i] = c[i];
}

// "Matrix fragments for mma.m16n8k16 with floating point type": elements a0 … a7, b0 … b3 and
// c0 … c3 of a lane, two 16-bit elements to a register, the lower index in the lower half.
inline void check_multiply() {
  Managed<uint32_t> a(4 * kLanes), b(2 * kLanes);
  Managed<float> c(4 * kLanes);
  float first[16][16], second[16][8], sum[16][8];
  for (int i = 0; i < 256; ++i) first[i / 16][i % 16] = number(i);
  for (int i = 0; i < 128; ++i) second[i / 8][i % 8] = number(i + 300);
  for (int i = 0; i < 128; ++i) sum[i / 8][i % 8] = number(i + 500);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      uint32_t& bits = a[lane * 4 + i / 2];
      bits = (i % 2 == 0 ? 0 : bits) | bfloat16_bits(first[row][column]) << (i % 2 * 16);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), column = group;
      uint32_t& bits = b[lane * 2 + i / 2];
      bits = (i % 2 == 0 ? 0 : bits) | bfloat16_bits(second[row][column]) << (i % 2 * 16);
    }
    for (int i = 0; i < 4; ++i) {
      c[lane * 4 + i] = sum[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    }
  }
  run_warp(multiply_kernel, MultiplyArguments{a.data(), b.data(), c.data()}, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double expected = sum[row][column];
      for (int k = 0; k < 16; ++k) expected += double{first[row][k]} * second[k][column];
      require(c[lane * 4 + i] == expected, "mma.sync: element " + std::to_string(row) + ", " +
                                               std::to_string(column) + " is wrong");
    }
  }
}

// c and 16 products, all of which bfloat16 holds, in one instruction.
inline float add_products(float c, const float (&products)[16]) {
  Managed<uint32_t> a(4 * kLanes), b(2 * kLanes);
  Managed<float> sums(4 * kLanes);
  for (int i = 0; i < 4 * kLanes; ++i) a[i] = sums[i] = 0;
  for (int i = 0; i < 2 * kLanes; ++i) b[i] = bfloat16_bits(1) << 16 | bfloat16_bits(1);
  for (int k = 0; k < 16; ++k) {
    a[k % 8 / 2 * 4 + k / 8 * 2] |= bfloat16_bits(products[k]) << (k % 2 * 16);
  }
  sums[0] = c;
  run_warp(multiply_kernel, MultiplyArguments{a.data(), b.data(), sums.data()}, 0);
  return sums[0];
}

// How the tensor cores sum, by sums that tell.
inline std::string describe_tensor_core() {
  int at_a_time = 2;  // 1 is lost where it meets 2^30
  for (; at_a_time < 16; ++at_a_time) {
    float products[16] = {0x1p30f, -0x1p30f};
    products[at_a_time] = 1;
    if (add_products(0, products) == 1) break;
  }
  int guard_bits = 0;  // with i, 2^i products of 2^-(23 + i) are not lost beside 1
  for (int i = 1; i <= 3; ++i) {
    float products[16] = {};
    for (int k = 0; k < 1 << i; ++k) products[k] = std::ldexp(1.0f, -23 - i);
    if (add_products(1, products) != 1) guard_bits = i;
  }
  const float little = std::ldexp(1.0f, -26 - guard_bits);
  const bool toward_zero = add_products(1, {-little}) == 1 && add_products(-1, {little}) == -1;
  // ±2 and one and a half units in the last place
  const float above = add_products(1, {1, 0x1.8p-22f}), below = add_products(-1, {-1, -0x1.8p-22f});
  const char* const sums = above == 0x1.000002p1f && below == -above   ? "cut toward zero"
                           : above == 0x1.000004p1f && below == -above ? "rounded to nearest"
                                                                       : "neither";
  return "products added at a time: " + std::to_string(at_a_time) +
         (at_a_time == 2 ? " or fewer" : "") + (at_a_time == 16 ? " or more" : "") +
         "\nguard bits: " + std::to_string(guard_bits) + (guard_bits == 3 ? " or more" : "") +
         "\nwhat is less is cut " + (toward_zero ? "toward zero" : "to one side") + "\nsums are " +
         sums + "\n";
}

struct LoadArguments {
  uint32_t* r;  // (32, 4)
  bool transposed;
};

constexpr int kLoadRows = 40;  // of 8 values each; the rows of the matrices lie scattered in them

__host__ __device__ inline int row_of(int lane) { return (lane * 7 + 5) % kLoadRows; }

__global__ void load_kernel(const __grid_constant__ LoadArguments p) {
  uint16_t* const memory = shared_memory<uint16_t>();
  for (int i = threadIdx.x; i < kLoadRows * 8; i += kLanes) memory[i] = static_cast<uint16_t>(i);
  __syncthreads();
  uint32_t r[4];
  const uint16_t* const row = memory + row_of(threadIdx.x) * 8;
  if (p.transposed) {
    load_matrices_transposed(r, row);
  } else {
    load_matrices(r, row);
  }
  for (int i = 0; i < 4; ++i) p.r[threadIdx.x * 4 + i] = r[i];
}

// "ldmatrix": lane 4·row + i gets elements 2i and 2i + 1 of the row; with .trans of the column.
inline void check_load(bool transposed) {
  Managed<uint32_t> r(4 * kLanes);
  run_warp(load_kernel, LoadArguments{r.data(), transposed}, kLoadRows * 16);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const int lane = transposed ? 4 * column + row / 2 : 4 * row + column / 2;
        const int half = (transposed ? row : column) % 2;
        const uint32_t got = r[lane * 4 + matrix] >> (16 * half) & 0xffff;
        require(got == static_cast<uint32_t>(row_of(matrix * 8 + row) * 8 + column),
                "ldmatrix: matrix " + std::to_string(matrix) + ", row " + std::to_string(row) +
                    ", column " + std::to_string(column) + " is wrong");
      }
    }
  }
}

struct ProductArguments {
  const uint16_t *a, *b;  // (16, 16); (16, 16) as it lies
  bool transposed;        // b is (k, n), not (n, k)
  float* c;               // (16, 16)
};

// c = a · b with all operands as they lie in memory, as the kernels use both instructions.
__global__ void product_kernel(const __grid_constant__ ProductArguments p) {
  uint16_t* const memory = shared_memory<uint16_t>();
  const int lane = threadIdx.x, row = lane % 16, half = lane / 16 * 8;
  copy_async(memory + row * 16 + half, p.a + row * 16 + half);
  copy_async(memory + 256 + row * 16 + half, p.b + row * 16 + half);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  load_matrices(a, memory + row * 16 + half);
  // Matrices in the order (n 0, k 0), (n 0, k 8), (n 8, k 0), (n 8, k 8).
  const int n = lane / 16 * 8, k = lane / 8 % 2 * 8, inner = lane % 8;
  if (p.transposed) {
    load_matrices_transposed(b, memory + 256 + (k + inner) * 16 + n);
  } else {
    load_matrices(b, memory + 256 + (n + inner) * 16 + k);
  }
  for (int block = 0; block < 2; ++block) {
    float c[4] = {};
    const uint32_t pair[2] = {b[block * 2], b[block * 2 + 1]};
    multiply(c, a, pair);
    for (int i = 0; i < 4; ++i) {
      p.c[(lane / 4 + i / 2 * 8) * 16 + block * 8 + lane % 4 * 2 + i % 2] = c[i];
    }
  }
}

inline void check_product(bool transposed) {
  Managed<uint16_t> a(256), b(256);
  Managed<float> c(256);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<uint16_t>(bfloat16_bits(number(i)));
  for (int i = 0; i < 256; ++i) b[i] = static_cast<uint16_t>(bfloat16_bits(number(i + 1000)));
  run_warp(product_kernel, ProductArguments{a.data(), b.data(), transposed, c.data()}, 1024);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      double expected = 0;
      for (int k = 0; k < 16; ++k) {
        expected +=
            double{number(m * 16 + k)} * number(1000 + (transposed ? k * 16 + n : n * 16 + k));
      }
      require(c[m * 16 + n] == expected,
              "product: element " + std::to_string(m) + ", " + std::to_string(n) + " is wrong");
    }
  }
}

struct CopyArguments {
  const uint8_t* source;  // (2, 32, 16)
  uint8_t* target;        // the same
  uint8_t* aligned;       // whether shared memory is
};

// Lane l copies l % 17 bytes and zeros in one group, and 16 in a second one.
__global__ void copy_kernel(const __grid_constant__ CopyArguments p) {
  uint8_t* const memory = shared_memory<uint8_t>();
  const int lane = threadIdx.x, own = lane * 16, other = (lane + 1) % kLanes * 16;
  if (lane == 0) *p.aligned = reinterpret_cast<uintptr_t>(memory) % 128 == 0;
  copy_async(memory + own, p.source + own, lane % 17);
  copy_async_commit();
  copy_async(memory + 512 + own, p.source + 512 + own);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) p.target[other + i] = memory[other + i];
  copy_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) p.target[512 + other + i] = memory[512 + other + i];
}

inline void check_copy() {
  Managed<uint8_t> source(1024), target(1024), aligned(1);
  for (int i = 0; i < 1024; ++i) source[i] = static_cast<uint8_t>(1 + i % 251);
  run_warp(copy_kernel, CopyArguments{source.data(), target.data(), aligned.data()}, 1024);
  require(aligned[0] == 1, "shared memory is not aligned to 128 bytes");
  for (int i = 0; i < 1024; ++i) {
    const bool copied = i >= 512 || i % 16 < i / 16 % 17;
    require(target[i] == (copied ? source[i] : 0),
            "cp.async: byte " + std::to_string(i) + " is wrong");
  }
}

}  // namespace
}  // namespace pfgm
