// SPDX-License-Identifier: Apache-2.0
// All products of queries, or of cotangents, with references.
#include "products.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

// Rows of the queries and of the references, kBlockK columns at a time.
struct CompareSource {
  const CompareArguments& c;
  int64_t first_query, first_reference;
  int64_t column = -kBlockK;

  __device__ CompareSource(const CompareArguments& c, int64_t first_query, int64_t first_reference)
      : c(c), first_query(first_query), first_reference(first_reference) {}

  __device__ void begin_step() { column += kBlockK; }

  __device__ void copy_a(int part, int row, int offset, uint16_t* to) const {
    const int64_t b = minimum(first_query + row, c.p.batch - 1);
    copy_async(to, c.a + (part * c.p.batch + b) * c.width + column + offset);
  }

  __device__ void copy_b(int part, int row, int offset, uint16_t* to) const {
    const int64_t j = minimum(first_reference + row, c.p.count - 1);
    copy_async(to, c.p.parts + part * c.p.plane + j * c.width + column + offset);
  }
};

// Turns products a·y_j into r_j = ‖y_j‖² − centre − 2 a·y_j, and writes the smallest of each query.
__device__ void make_distances(const CompareArguments& c, const Position& at, int64_t first_query,
                               int64_t tile, Sums& sums) {
  float* const smallest = shared_memory<float>();  // (kTile, kWarpsN)
  PFGM_UNROLL
  for (int m = 0; m < kFragmentsM; ++m) {
    float least[2] = {INFINITY, INFINITY};
    PFGM_UNROLL
    for (int n = 0; n < kFragmentsN; ++n) {
      PFGM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t j = tile * kTile + at.column_of(n, i);
        const float square = j < c.p.count ? c.p.squares[j] : INFINITY;
        sums[m][n][i] = square - 2 * sums[m][n][i];
        least[i / 2] = minimum(least[i / 2], sums[m][n][i]);
      }
    }
    PFGM_UNROLL
    for (int half = 0; half < 2; ++half) {
      for (int offset = 1; offset < 4; offset *= 2) {
        least[half] = minimum(least[half], __shfl_xor_sync(kAllLanes, least[half], offset));
      }
      if (at.lane % 4 == 0) {
        smallest[at.row_of(m, 2 * half) * kWarpsN + at.column / kWarpN] = least[half];
      }
    }
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  const int64_t b = first_query + row;
  if (row >= kTile || b >= c.p.batch) return;
  float least = INFINITY;
  for (int i = 0; i < kWarpsN; ++i) least = minimum(least, smallest[row * kWarpsN + i]);
  c.minima[b * ((c.p.count + kTile - 1) / kTile) + tile] = least;
}

// r_j = ‖y_j‖² − centre − 2 a·y_j of a tile of queries and references, and of each query the
// smallest; or where there is a cut a·y_j, in tiles in which the smallest r of any query is within
// its cut.
template <int kAParts, int kBParts>
__global__ void __launch_bounds__(kThreads, 1)
    compare_kernel(const __grid_constant__ CompareArguments c) {
  const FieldParams& p = c.p;
  const int thread = static_cast<int>(threadIdx.x);
  // Blocks that run together share references: there are far more of these than of queries.
  const int64_t query_blocks = (p.batch + kTile - 1) / kTile, tiles = (p.count + kTile - 1) / kTile;
  const int64_t first_query = blockIdx.x % query_blocks * kTile;
  const int64_t tile = blockIdx.x / query_blocks, first_reference = tile * kTile;
  if (c.cut != nullptr) {
    const int64_t b = first_query + thread;
    const bool wanted = thread < kTile && b < p.batch && c.minima[b * tiles + tile] <= c.cut[b];
    if (block_reduce(static_cast<int>(wanted), Sum()) == 0) return;
  }

  Sums sums = {};
  CompareSource source(c, first_query, first_reference);
  Product<kAParts, kBParts, false>().run(static_cast<int>(c.width / kBlockK), source, sums);

  const Position at;
  if (c.cut == nullptr) make_distances(c, at, first_query, tile, sums);
  store(sums, at, p.batch - first_query, c.pitch - first_reference, c.pitch,
        c.out + first_query * c.pitch + first_reference);
}

template <int kAParts, int kBParts>
void launch_compare(const CompareArguments& c) {
  const int64_t blocks = divide_up(c.p.batch, kTile) * divide_up(c.p.count, kTile);
  launch(compare_kernel<kAParts, kBParts>, blocks, kThreads,
         ProductTraits<kAParts, kBParts>::kSharedBytes, c);
}

}  // namespace

void compare(const CompareArguments& c) {
  if (c.p.num_parts == 1) {
    c.num_parts == 3 ? launch_compare<3, 1>(c) : launch_compare<2, 1>(c);
  } else {
    c.num_parts == 3 ? launch_compare<3, 3>(c) : launch_compare<2, 2>(c);
  }
}

}  // namespace pfgm
