// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), in few dimensions:
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
#include "direct_sum.cuh"

namespace pfgm {
namespace {

constexpr int kChunk = 32;  // references that the nearest is one of

// Where many references are equal their rounding errors do not average out: so many of a sample.
constexpr int kSample = 1024, kCrowd = 8;
constexpr int kCrowdBlocks = kSample / kDirectThreads;

// The least value of `lanes` neighbours, and the smallest place that has it.
template <class Value, class Index>
__device__ __forceinline__ void find_least(Value& value, Index& place, int lanes) {
  for (int other = lanes / 2; other > 0; other /= 2) {
    const Value theirs = __shfl_xor_sync(kAllLanes, value, other);
    const Index their_place = __shfl_xor_sync(kAllLanes, place, other);
    if (theirs < value || (theirs == value && their_place < place)) {
      value = theirs;
      place = their_place;
    }
  }
}

// The smallest ‖x − x0‖² of every step-th reference of a chunk, for each of a thread's queries.
template <int kDim>
__device__ __forceinline__ void find_nearest(const float* chunk, int first, int step,
                                             const float (&x)[Shape<kDim>::kQueries][kDim],
                                             float (&least)[Shape<kDim>::kQueries]) {
  PFGM_UNROLL
  for (float& value : least) value = INFINITY;
  PFGM_UNROLL_BY_FOUR
  for (int row = first; row < kChunk; row += step) {
    float y[kDim];
    load_row<kDim>(chunk, row, y);
    PFGM_UNROLL
    for (int q = 0; q < Shape<kDim>::kQueries; ++q) {
      float square = 0;
      PFGM_UNROLL
      for (int c = 0; c < kDim; ++c) square += (y[c] - x[q][c]) * (y[c] - x[q][c]);
      least[q] = ::fminf(least[q], square);
    }
  }
}

// The smallest ‖x − x0‖² of a part of the references, and the chunk where it is.
template <int kDim>
__global__ void __launch_bounds__(kDirectThreads, Shape<kDim>::blocks(false))
    nearest_kernel(const __grid_constant__ DirectArguments a) {
  constexpr int kQueries = Shape<kDim>::kQueries;
  const FieldParams& p = a.p;
  float* const tile = shared_memory<float>();
  const Place<kDim> place(a);
  float x[kQueries][kDim], smallest[kQueries];
  int chunk[kQueries];
  PFGM_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const int64_t b = place.row(p, q);
    smallest[q] = INFINITY;
    chunk[q] = 0;
    PFGM_UNROLL
    for (int c = 0; c < kDim; ++c) {
      x[q][c] = c < p.dim ? p.x_single[b * p.dim + c] : 0;
    }
  }

  clear_tile<kDim>(tile);
  for (int offset = 0; offset < place.size; offset += kTile) {
    const int64_t first = place.begin + offset;
    load_tile<kDim>(p, first, tile);
    if (place.query >= p.batch) continue;
    for (int start = 0; start < kTile; start += kChunk) {
      float least[kQueries];
      find_nearest<kDim>(tile + start * Shape<kDim>::kStride, place.share, a.shares, x, least);
      PFGM_UNROLL
      for (int q = 0; q < kQueries; ++q) {
        if (least[q] < smallest[q]) chunk[q] = static_cast<int>((first + start) / kChunk);
        smallest[q] = ::fminf(least[q], smallest[q]);
      }
    }
  }

  PFGM_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    find_least(smallest[q], chunk[q], a.shares);
    const int64_t b = place.query + q * place.step;
    if (place.share == 0 && b < p.batch) {
      a.near_square[b * a.splits + place.split] = smallest[q];
      a.near_chunk[b * a.splits + place.split] = chunk[q];
    }
  }
}

// The nearest reference of all parts and its squared distance in double. A warp to a query.
__global__ void __launch_bounds__(kDirectThreads)
    anchor_kernel(const __grid_constant__ DirectArguments a) {
  const FieldParams& p = a.p;
  const int64_t b = query_of_warp();
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32;
  float smallest = INFINITY;
  int chunk = 0;
  for (int split = lane; split < a.splits; split += 32) {
    const float other = a.near_square[b * a.splits + split];
    if (other < smallest) {
      smallest = other;
      chunk = a.near_chunk[b * a.splits + split];
    }
  }
  find_least(smallest, chunk, 32);
  int64_t row = static_cast<int64_t>(__shfl_sync(kAllLanes, chunk, 0)) * kChunk + lane;
  if (row >= p.count) row = p.count - 1;
  double square = 0;
  for (int64_t c = 0; c < p.dim; ++c) {
    const double difference = load_float(p, row * p.dim + c) - p.x_single[b * p.dim + c];
    square += difference * difference;
  }
  find_least(square, row, 32);
  if (lane == 0) {
    p.anchor[b] = row;
    a.square[b] = square;
  }
}

struct CrowdArguments {
  FieldParams p;
};

// How many references of a sample equal an earlier one of it.
__global__ void __launch_bounds__(kDirectThreads)
    crowd_kernel(const __grid_constant__ CrowdArguments a) {
  constexpr int kFactor = 40503, kModulus = 65521;
  double* const hashes = shared_memory<double>();
  int* const counts = reinterpret_cast<int*>(hashes + kSample);
  const FieldParams& p = a.p;
  const int sample = p.count < kSample ? static_cast<int>(p.count) : kSample;
  for (int i = threadIdx.x; i < sample; i += kDirectThreads) {
    // Of each share one at random: an order may have a period.
    const int64_t share = p.count / sample;
    const int64_t row = (i * p.count / sample + i * kFactor % share) * p.dim;
    double hash = 0;
    for (int c = 0; c < p.dim; ++c) hash += load_float(p, row + c) * (c * kFactor % kModulus + 1.0);
    hashes[i] = hash;
  }
  __syncthreads();
  const int mine = blockIdx.x * kDirectThreads + threadIdx.x;
  int equal = 0;
  for (int i = 0; mine < sample && i < mine; ++i) equal |= hashes[i] == hashes[mine];
  const int count = __popc(__ballot_sync(kAllLanes, equal));
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int total = 0;
  for (int w = 0; w < kDirectThreads / 32; ++w) total += counts[w];
  p.crowd[blockIdx.x] = total;
}

__device__ bool is_sure(const DirectArguments& a, double reach, double log_weight) {
  int equal = 0;
  for (int block = 0; block < kCrowdBlocks; ++block) equal += a.p.crowd[block];
  const double far = ::fmax(kSmallReach, kRootReach * ::sqrt(static_cast<double>(a.p.dim)));
  if (!(reach <= (equal > 0 ? far / 2 : far))) return false;
  if (equal < kCrowd) return true;
  const double spread = log_weight + ::log(static_cast<double>(a.p.count));
  const double most = reach + 2 * spread;
  return most <= kCrowdReach || (a.weighing.power != 0 && a.p.half_k <= kCrowdReach);
}

// Adds the nearest reference to what was summed of the others. A warp to a query.
__global__ void __launch_bounds__(kDirectThreads)
    direct_finish_kernel(const __grid_constant__ DirectArguments a) {
  const FieldParams& p = a.p;
  const int64_t b = query_of_warp();
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32;
  double total;
  const double sum = combine_sums(a, b, total);
  const int64_t anchor = p.anchor[b];
  const double square = a.square[b];
  const Scale scale(p, b, square);
  const double logit = scale.logit(square), weight = ::exp(logit), others = total;
  total += weight;
  double column = 0;
  if (lane < p.dim) {
    const int64_t at = b * p.dim + lane;
    const double difference = load_float(p, anchor * p.dim + lane) - p.x_single[at];
    column = (sum + weight * difference) / total;
    p.displacement[at] = column;
  }
  const double length = warp_sum(column * column);
  const bool faint = others < kFaint * total && square < kFaint * length;
  const double log_total = ::log(total);
  settle(a, b, !faint && is_sure(a, scale.reach(square), logit - log_total), sum, total);
  if (lane != 0) return;
  p.log_mass[b] = scale.own_logit() + log_total;
  p.anchor_log_weight[b] = logit - log_total;
}

}  // namespace

void count_crowd(const FieldParams& p) {
  launch(crowd_kernel, kCrowdBlocks, kDirectThreads,
         kSample * sizeof(double) + kDirectThreads / 32 * sizeof(int), CrowdArguments{p});
}

void direct_forward(const FieldParams& p, Workspace& workspace) {
  DirectArguments a = share_out(p, p.half_k, workspace);
  a.near_square = workspace.take<float>(p.batch * a.splits);
  a.near_chunk = workspace.take<int>(p.batch * a.splits);
  a.square = workspace.take<double>(p.batch);
  launch_direct(a, [](auto dim) { return nearest_kernel<decltype(dim)::value>; });
  launch_warps(anchor_kernel, a);
  launch_direct(a, [](auto dim) { return direct_sum_kernel<decltype(dim)::value, false>; });
  launch_warps(direct_finish_kernel, a);
  exact_forward(p, workspace, a.left, {}, workspace.take<double>(p.batch));
}

}  // namespace pfgm
