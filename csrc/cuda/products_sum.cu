// SPDX-License-Identifier: Apache-2.0
// Weighted sums of references.
#include "products.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

// Weights of the listed tiles of references, and some columns of these references.
struct SumSource {
  const TwoPassArguments& a;
  const int* list;
  int position, last;  // in the list
  int tile = 0, following;
  int64_t first_query, first_column;
  bool summed[2];  // whether the query of a row that this thread copies has weights

  __device__ SumSource(const TwoPassArguments& a, int64_t block, int split, int64_t first_column)
      : a(a),
        list(a.list + block * a.list_stride()),
        position(split),
        last(a.length[block] - 1),
        first_query(block * kTile),
        first_column(first_column) {
    following = list[minimum(position, last)];
    for (int half = 0; half < 2; ++half) {
      const int64_t b = first_query + half * (kTile / 2) + threadIdx.x / (kBlockK / kChunk);
      summed[half] = b < a.p.batch && a.cut[b] != -INFINITY;
    }
  }

  // The number of the tile after this one is read ahead: copies need not wait for it.
  __device__ void begin_step() {
    tile = following;
    position += a.splits;
    following = list[minimum(position, last)];
  }

  __device__ void copy_a(int part, int row, int offset, uint16_t* to) const {
    const bool inside = row < kTile / 2 ? summed[0] : summed[1];
    const int64_t b = inside ? first_query + row : 0;
    const int64_t from = (part * a.p.batch + b) * a.stride() + tile * kBlockK + offset;
    copy_async(to, a.weights + from, inside ? 16 : 0);
  }

  __device__ void copy_b(int part, int row, int offset, uint16_t* to) const {
    const bool inside = first_column + offset < a.width;
    const int64_t j = minimum(static_cast<int64_t>(tile) * kBlockK + row, a.p.count - 1);
    const int64_t from = part * a.p.plane + j * a.width + (inside ? first_column + offset : 0);
    copy_async(to, a.p.parts + from, inside ? 16 : 0);
  }
};
static_assert(kPartChunks / kThreads == 2, "a thread copies chunks of two rows of weights");

// Σ_j w_j y_j of a tile of queries and columns, over every splits-th tile of references in which
// any of the queries has a weight.
template <int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    sum_kernel(const __grid_constant__ TwoPassArguments a) {
  const int64_t query_blocks = (a.p.batch + kTile - 1) / kTile;
  const int64_t column_blocks = (a.width + kTile - 1) / kTile;
  const int64_t block = blockIdx.x % query_blocks, rest = blockIdx.x / query_blocks;
  const int64_t first_column = rest % column_blocks * kTile;
  const int split = static_cast<int>(rest / column_blocks);
  const int length = a.length[block];
  if (length == 0) return;
  SumSource source(a, block, split, first_column);
  Sums sums = {};
  Product<2, kParts, true>().run((length - split + a.splits - 1) / a.splits, source, sums);
  const int64_t row = split * a.p.batch + block * kTile;
  store(sums, Position(), a.p.batch - block * kTile, a.width - first_column, a.width,
        a.products + row * a.width + first_column);
}

template <int kParts>
void launch_sum(const TwoPassArguments& a) {
  const int64_t blocks = divide_up(a.p.batch, kTile) * divide_up(a.width, kTile) * a.splits;
  launch(sum_kernel<kParts>, blocks, kThreads, ProductTraits<2, kParts>::kSharedBytes, a);
}

}  // namespace

void weighted_sum(const TwoPassArguments& a) {
  if (a.p.num_parts == 1) {
    launch_sum<1>(a);
  } else {
    launch_sum<2>(a);
  }
}

}  // namespace pfgm
