// SPDX-License-Identifier: Apache-2.0
// Tiles of matrix products on tensor cores at nearly float precision: sums of products of bfloat16
// parts, the small ones first. What the parts of lower order would add to each other is left out.
#pragma once

#include "../field_math.h"
#include "intrinsics.cuh"
#include "kernel_traits.cuh"
#include "launch.cuh"

namespace pfgm {
namespace {

// Where a warp and a lane stand in a tile and in the fragments of its products.
struct Position {
  int lane, row, column;  // the warp's first row and column

  __device__ Position()
      : lane(static_cast<int>(threadIdx.x) % kWarp),
        row(static_cast<int>(threadIdx.x) / kWarp / kWarpsN * kWarpM),
        column(static_cast<int>(threadIdx.x) / kWarp % kWarpsN * kWarpN) {}

  // Of element `index` of sums[m][n].
  __device__ int row_of(int m, int index) const {
    return row + m * kMmaM + index / 2 * 8 + lane / 4;
  }
  __device__ int column_of(int n, int index) const {
    return column + n * kMmaN + lane % 4 * 2 + index % 2;
  }
};

template <class T>
__device__ T minimum(T a, T b) {
  return a < b ? a : b;
}

using Sums = float[kFragmentsM][kFragmentsN][4];

// One part of an operand in shared memory: rows of kColumns elements whose chunks are permuted so
// that the same chunk of eight rows in succession, which is what load_matrices reads, lies in
// different banks.
template <int kColumns>
struct SharedPart {
  static constexpr int kChunks = kColumns / kChunk;  // of a row
  static constexpr int kRowsPerLine =
      kChunks < 8 ? 8 / kChunks : 1;  // a line: 128 bytes, all banks
  static_assert(kChunks * kRowsPerLine % 8 == 0);

  __device__ static int offset(int row, int chunk) {
    const int permuted = chunk ^ (row / kRowsPerLine % (kChunks < 8 ? kChunks : 8));
    return (row * kChunks + permuted) * kChunk;
  }
};

// a (rows, k) times b (columns, k) transposed, or where kTransposed times b (k, columns), of a tile
// of rows and columns; kBlockK terms in each step.
template <int kAParts, int kBParts, bool kTransposed>
class Product {
  using Traits = ProductTraits<kAParts, kBParts>;
  using PartA = SharedPart<kBlockK>;
  using PartB = SharedPart<kTransposed ? kTile : kBlockK>;
  using FragmentsA = uint32_t[kFragmentsM][4];
  using FragmentsB = uint32_t[kFragmentsN][2];

 public:
  // Adds `steps` steps to sums. source.begin_step() is called before what each step needs is
  // copied, copy_a(part, row, column, to) starts the copy of a chunk of a to shared memory, and
  // copy_b likewise: (row, column) of a tile of the operand as it is stored.
  template <class Source>
  __device__ void run(int steps, Source& source, Sums& sums) const {
    for (int step = 0; step < Traits::kStages - 1; ++step) copy(step, steps, source);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<Traits::kStages - 2>();
      __syncthreads();  // the stage is there for all, and all have done with the one before
      copy(step + Traits::kStages - 1, steps, source);
      multiply_stage(stage(step), sums);
    }
    __syncthreads();  // the shared memory is free: the groups that were not waited for are empty
  }

 private:
  const Position at_;

  __device__ static uint16_t* stage(int step) {
    return shared_memory<uint16_t>() + step % Traits::kStages * (Traits::kStageBytes / 2);
  }

  template <class Source>
  __device__ static void copy(int step, int steps, Source& source) {
    if (step < steps) {
      source.begin_step();
      uint16_t* to = stage(step);
      for_chunks<PartA, kAParts>(to, [&](auto... chunk) { source.copy_a(chunk...); });
      for_chunks<PartB, kBParts>(to + kAParts * kPartBytes / 2,
                                 [&](auto... chunk) { source.copy_b(chunk...); });
    }
    copy_async_commit();  // an empty group too: waits count groups
  }

  template <class Part, int kParts, class Copy>
  __device__ static void for_chunks(uint16_t* to, Copy copy) {
    PFGM_UNROLL
    for (int part = 0; part < kParts; ++part) {
      PFGM_UNROLL
      for (int i = 0; i < kPartChunks / kThreads; ++i) {
        const int index = static_cast<int>(threadIdx.x) + i * kThreads;
        const int row = index / Part::kChunks, chunk = index % Part::kChunks;
        copy(part, row, chunk * kChunk, to + part * (kPartBytes / 2) + Part::offset(row, chunk));
      }
    }
  }

  __device__ void load_a(const uint16_t* part, int k, FragmentsA& a) const {
    PFGM_UNROLL
    for (int m = 0; m < kFragmentsM; ++m) {
      const int row = at_.row + m * kMmaM + at_.lane % 16;
      load_matrices(a[m], part + PartA::offset(row, k * (kMmaK / kChunk) + at_.lane / 16));
    }
  }

  __device__ void load_b(const uint16_t* part, int k, FragmentsB& b) const {
    PFGM_UNROLL
    for (int n = 0; n < kFragmentsN; n += 2) {
      const int column = at_.column + n * kMmaN;
      uint32_t two[4];
      if constexpr (kTransposed) {
        const int row = k * kMmaK + at_.lane % 16;
        load_matrices_transposed(two, part + PartB::offset(row, column / kChunk + at_.lane / 16));
      } else {
        const int row = column + at_.lane / 16 * 8 + at_.lane % 8;
        load_matrices(two, part + PartB::offset(row, k * (kMmaK / kChunk) + at_.lane / 8 % 2));
      }
      b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
    }
  }

  __device__ static void multiply_fragments(const FragmentsA& a, const FragmentsB& b, Sums& sums) {
    PFGM_UNROLL
    for (int m = 0; m < kFragmentsM; ++m) {
      PFGM_UNROLL
      for (int n = 0; n < kFragmentsN; ++n) multiply(sums[m][n], a[m], b[n]);
    }
  }

  // Sums of one stage are formed from zero and then added: so little is truncated.
  __device__ void multiply_stage(const uint16_t* a, Sums& sums) const {
    constexpr int kPart = kPartBytes / 2;
    const uint16_t* const b = a + kAParts * kPart;
    Sums partial = {};
    FragmentsA a_high[kFragmentsK], a_rest;
    FragmentsB b_high[kFragmentsK], b_rest;
    PFGM_UNROLL
    for (int k = 0; k < kFragmentsK; ++k) {
      load_b(b, k, b_high[k]);
      if constexpr (kAParts == 3) {
        load_a(a + 2 * kPart, k, a_rest);
        multiply_fragments(a_rest, b_high[k], partial);
      }
      load_a(a, k, a_high[k]);
      if constexpr (kBParts == 3) {
        load_b(b + 2 * kPart, k, b_rest);
        multiply_fragments(a_high[k], b_rest, partial);
      }
      load_a(a + kPart, k, a_rest);
      if constexpr (kBParts >= 2) load_b(b + kPart, k, b_rest);
      if constexpr (kBParts == 3) multiply_fragments(a_rest, b_rest, partial);
      multiply_fragments(a_rest, b_high[k], partial);
      if constexpr (kBParts >= 2) multiply_fragments(a_high[k], b_rest, partial);
    }
    PFGM_UNROLL
    for (int k = 0; k < kFragmentsK; ++k) multiply_fragments(a_high[k], b_high[k], partial);
    PFGM_UNROLL
    for (int m = 0; m < kFragmentsM; ++m) {
      PFGM_UNROLL
      for (int n = 0; n < kFragmentsN; ++n) {
        PFGM_UNROLL
        for (int i = 0; i < 4; ++i) sums[m][n][i] += partial[m][n][i];
      }
    }
  }
};

struct alignas(8) Pair {
  float first, second;
};

// Writes the first rows and columns (a multiple of two) of a tile to rows `stride` apart.
__device__ inline void store(const Sums& sums, const Position& at, int64_t rows, int64_t columns,
                             int64_t stride, float* out) {
  PFGM_UNROLL
  for (int m = 0; m < kFragmentsM; ++m) {
    PFGM_UNROLL
    for (int n = 0; n < kFragmentsN; ++n) {
      PFGM_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const int row = at.row_of(m, i), column = at.column_of(n, i);
        if (row >= rows || column >= columns) continue;
        const Pair pair = {sums[m][n][i], sums[m][n][i + 1]};
        *reinterpret_cast<Pair*>(out + row * stride + column) = pair;
      }
    }
  }
}

}  // namespace
}  // namespace pfgm
