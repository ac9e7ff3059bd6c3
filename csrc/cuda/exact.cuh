// SPDX-License-Identifier: Apache-2.0
// Direct differences in double: what the forward and the backward pass share.
//
// A block takes one query and a part of the references. Those meant are listed, and then taken
// kRows at a time:
//
//   distances   several lanes to a reference, ‖x − x0_j‖² to shared memory
//   weights     a thread to a reference, which the pass defines; those that matter are listed
//   sums        Σ_j w_j (x0_j − x), threads over columns, and over references where those are few
//
// The work follows the number of references meant; each is read twice, the second time from cache.
// Where few queries are meant, the references of each are shared out among all blocks, and a second
// kernel combines what they found.
#pragma once

#include "../field_math.h"
#include "intrinsics.cuh"
#include "passes.cuh"
#include "warp.cuh"

namespace pfgm {
namespace {

constexpr int kExactThreads = 256;
constexpr int kWarps = kExactThreads / 32;
constexpr int kRows = kExactThreads;          // references weighed at a time, one to a thread
constexpr int kEach = 4;                      // candidates that a thread looks at at a time
constexpr int kSpan = kExactThreads * kEach;  // and that a block does
constexpr int kBlocksEach = 3;                // blocks that a multiprocessor has registers for

// Weights below exp(−kCutoff)/N of the nearest's cannot be seen in a sum in double.
constexpr double kCutoff = 38;

// What a block has found in its part of the references.
struct Part {
  double nearest;  // forward: the squared distance that weights are relative to
  double sum;      // Σ w_j; backward: Σ c_j (Gaussian: Σ c_j ‖x − x0_j‖²)
  int64_t anchor;
  bool empty;
};

struct ExactArguments {
  FieldParams p;
  Left left;
  const float* r;  // (B, pitch), null: all references
  Summed summed;
  double* total;         // (B,)
  double* weights;       // (B, N), null: not asked for
  double* coefficients;  // (B, N)
  int64_t slots;         // how many parts queries can have in all, but for one of each
  Part* parts;           // (max(B, slots),)
  double* sums;          // (slots, d) of queries with several parts
  double* result;        // (B, d) what they become: of those with one part at once
};

struct Scratch {
  double squares[kRows], pull[kRows], weights[kRows];
  double partial[kWarps];
  int64_t places[kWarps];
  int heavy[kRows];         // rows whose weight matters
  int rows[kRows + kSpan];  // references meant, counted from the first of the part
  int counts[kWarps];
};

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// Writes the numbers first + e with kept[e] of all threads of the block to `out`, in their order;
// returns how many there are. counts is (kWarps,) in shared memory.
template <int n>
__device__ int compact(const bool (&kept)[n], int first, int* out, int* counts) {
  int before = 0, total = 0;
  PFGM_UNROLL
  for (int e = 0; e < n; ++e) {
    const unsigned ballot = __ballot_sync(kAllLanes, kept[e]);
    before += __popc(ballot & ((1u << lane()) - 1));
    total += __popc(ballot);
  }
  if (lane() == 0) counts[warp()] = total;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) before += counts[w];
    total += counts[w];
  }
  PFGM_UNROLL
  for (int e = 0; e < n; ++e) {
    if (kept[e]) out[before++] = first + e;
  }
  __syncthreads();
  return total;
}

// Σ v over the block's threads, the same in all of them. There is a barrier before `partial` is
// written again: that of a part's references, which are listed first, or that of its task.
__device__ inline double block_sum(double v, double* partial) {
  v = warp_sum(v);
  if (lane() == 0) partial[warp()] = v;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += partial[w];
  return sum;
}

// A query and a part of the references.
struct Task {
  int64_t index;  // into ExactArguments::parts
  int parts;      // that the query has
  int64_t b, begin, end;

  __device__ Task(const ExactArguments& a, int64_t index, int parts)
      : index(index), parts(parts), b(a.left.listed[1 + index / parts]) {
    const int64_t first = a.p.ranges == nullptr ? 0 : a.p.ranges[2 * b];
    const int64_t last = a.p.ranges == nullptr ? a.p.count : a.p.ranges[2 * b + 1];
    const int64_t spans = (last - first + kSpan - 1) / kSpan, part = index % parts;
    begin = first + spans * part / parts * kSpan;
    end = first + spans * (part + 1) / parts * kSpan;
    if (end > last) end = last;
  }

  __device__ double* sums(const ExactArguments& a) const {
    return parts > 1 ? a.sums + index * a.p.dim : a.result + b * a.p.dim;
  }
};

__device__ inline int parts_of_a_query(const ExactArguments& a) {
  const int64_t spans = (a.p.count + kSpan - 1) / kSpan;
  const int64_t parts = a.left.listed[0] == 0 ? 1 : a.slots / a.left.listed[0];
  return static_cast<int>(parts < 1 ? 1 : parts < spans ? parts : spans);
}

// Element `index` of the stored references, whose type is known.
template <class Stored>
__device__ double load_value(const FieldParams& p, int64_t index) {
  const Stored stored = static_cast<const Stored*>(p.values)[index];
  if constexpr (sizeof(Stored) == 1) {
    return p.table[stored];
  } else {
    return stored;
  }
}

// Lists references meant from `next` on, until there are kRows or the part ends; returns how many.
__device__ inline int list_references(const ExactArguments& a, const Task& task, int64_t& next,
                                      Scratch& scratch) {
  struct alignas(16) Four {
    float r[kEach];
  };
  const float limit = a.left.limit[task.b];
  int count = 0;
  while (count < kRows && next < task.end) {
    const int64_t mine = next + threadIdx.x * kEach;
    bool kept[kEach];
    PFGM_UNROLL
    for (int e = 0; e < kEach; ++e) kept[e] = mine + e < task.end;
    if (a.r != nullptr && kept[0]) {  // rows of r are padded to whole fours
      const Four four = *reinterpret_cast<const Four*>(a.r + task.b * pitch(a.p.count) + mine);
      PFGM_UNROLL
      for (int e = 0; e < kEach; ++e) kept[e] = kept[e] && !(four.r[e] > limit);  // NaN is meant
    }
    count +=
        compact(kept, static_cast<int>(mine - task.begin), scratch.rows + count, scratch.counts);
    next += kSpan;
  }
  return count;
}

// ‖x − x0_j‖² of `count` listed references to scratch.squares, and with kPull g·(x0_j − x) to
// scratch.pull.
template <class Stored, bool kPull>
__device__ void find_distances(const FieldParams& p, const Task& task, const int* rows, int count,
                               Scratch& scratch) {
  const int64_t query = task.b * p.dim;
  const double* g = kPull ? p.grad_displacement + query : nullptr;
  const int dim = static_cast<int>(p.dim);
  const int lanes = p.dim <= 8 ? 1 : p.dim <= 32 ? 4 : 32, per_warp = 32 / lanes;
  for (int start = warp() * per_warp; start < count; start += kWarps * per_warp) {
    const int i = start + lane() / lanes;
    double square = 0, pull = 0;
    if (i < count) {
      const int64_t row = (task.begin + rows[i]) * p.dim;
      PFGM_UNROLL_BY_FOUR
      for (int c = lane() % lanes; c < dim; c += lanes) {
        const double difference = load_value<Stored>(p, row + c) - load_query(p, query + c);
        square += difference * difference;
        if (kPull) pull += difference * g[c];
      }
    }
    square = warp_sum(square, lanes);
    if (kPull) pull = warp_sum(pull, lanes);
    if (i < count && lane() % lanes == 0) {
      scratch.squares[i] = RadialKernel(p.half_k, p.t[task.b]).checked(square);
      if (kPull) scratch.pull[i] = pull;
    }
  }
  __syncthreads();
}

// Σ w_j (x0_j − x) of one task. A thread owns columns, `width` apart, and where all fit into less
// than the block, every groups-th reference.
struct ColumnSums {
  int64_t dim;
  int width;
  bool onto;  // whether sums are added to what there is
  double* out;
  double kept = 0;  // of the thread's column where it has one at most; else they are in `out`
  bool first = true;

  __device__ ColumnSums(const ExactArguments& a, const Task& task, bool added)
      : dim(a.p.dim), width(1), onto(added && task.parts == 1), out(task.sums(a)) {
    while (width < dim && width < kExactThreads) width *= 2;
  }

  __device__ bool spread() const { return width < kExactThreads; }

  // Scales what there is and adds `count` rows of heavy weights.
  template <class Stored>
  __device__ void add(const FieldParams& p, const Task& task, double factor, const int* rows,
                      int count, const Scratch& scratch) {
    const int groups = kExactThreads / width;
    for (int64_t c = threadIdx.x % width; c < dim; c += width) {
      const double x = load_query(p, task.b * dim + c);
      double sum = !first ? (spread() ? kept : out[c]) * factor : onto && !spread() ? out[c] : 0;
      PFGM_UNROLL_BY_FOUR
      for (int i = threadIdx.x / width; i < count; i += groups) {
        const int row = scratch.heavy[i];
        const int64_t index = (task.begin + rows[row]) * dim + c;
        sum += scratch.weights[row] * (load_value<Stored>(p, index) - x);
      }
      spread() ? kept = sum : out[c] = sum;
    }
    first = false;
  }

  // In shared memory that nothing else has used since the last barrier, nor does before the next.
  __device__ void store(double* shared) {
    if (first || !spread()) return;
    shared[threadIdx.x] = kept;
    for (int half = kExactThreads / 2; half >= width; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x >= dim) return;
    out[threadIdx.x] = shared[threadIdx.x] + (onto ? out[threadIdx.x] : 0);
  }
};

// Sums over the references of all tasks. Pass has for one task
//   weigh(task, rows, count, scratch, heavy): the weight of the thread's reference, of those at
//   scratch.squares, to scratch.weights, and whether it matters; returns what scales earlier sums
//   finish(part, scratch): its own sums
template <class Stored, class Pass>
__global__ void __launch_bounds__(kExactThreads, kBlocksEach)
    exact_kernel(const __grid_constant__ ExactArguments a) {
  Scratch& scratch = *shared_memory<Scratch>();
  const int parts = parts_of_a_query(a);
  const int64_t tasks = static_cast<int64_t>(a.left.listed[0]) * parts;
  for (int64_t index = blockIdx.x; index < tasks; index += gridDim.x) {
    const Task task(a, index, parts);
    if (a.p.ranges != nullptr) __syncthreads();  // a part of a short range has no references
    Pass pass(a, task);
    ColumnSums columns(a, task, Pass::kPull);
    int64_t next = task.begin;
    while (next < task.end) {
      const int listed = list_references(a, task, next, scratch);
      for (int start = 0; start < listed; start += kRows) {
        const int* rows = scratch.rows + start;
        const int count = listed - start < kRows ? listed - start : kRows;
        find_distances<Stored, Pass::kPull>(a.p, task, rows, count, scratch);
        bool heavy[1] = {};
        const double factor = pass.weigh(task, rows, count, scratch, heavy[0]);
        const int heavies = compact(heavy, threadIdx.x, scratch.heavy, scratch.counts);
        columns.add<Stored>(a.p, task, factor, rows, heavies, scratch);
      }
    }
    columns.store(scratch.squares);
    Part part = pass.finish(scratch);
    part.empty = columns.first;
    if (threadIdx.x == 0) a.parts[task.index] = part;
  }
}

// Combines the parts of the queries. Pass::combine(a, b, parts, count, factors) says what scales
// each of their sums; it writes the query's other results where `write`.
template <class Pass>
__global__ void __launch_bounds__(kExactThreads)
    exact_combine_kernel(const __grid_constant__ ExactArguments a) {
  double* factors = shared_memory<double>();
  const int parts = parts_of_a_query(a);
  const int64_t blocks = (a.p.dim + kExactThreads - 1) / kExactThreads;
  for (int64_t task = blockIdx.x; task < a.left.listed[0] * blocks; task += gridDim.x) {
    const int64_t query = task / blocks, first = query * parts, b = a.left.listed[1 + query];
    __syncthreads();
    Pass::combine(a, b, a.parts + first, parts, factors, task % blocks == 0);
    const int64_t c = task % blocks * kExactThreads + threadIdx.x;
    if (c >= a.p.dim || (Pass::kPull && parts == 1)) continue;
    double* const out = a.result + b * a.p.dim + c;
    double sum = Pass::kPull ? *out : 0;
    for (int part = 0; part < parts; ++part) {
      if (a.parts[first + part].empty) continue;
      sum += factors[part] * (parts > 1 ? a.sums[(first + part) * a.p.dim + c] : *out);
    }
    *out = sum;
  }
}

template <class Stored, class Pass>
void launch_exact(const ExactArguments& a, int64_t blocks) {
  launch(exact_kernel<Stored, Pass>, blocks, kExactThreads, sizeof(Scratch), a);
}

// The whole of a pass. a has what the pass alone needs.
template <class Pass>
void run_exact(ExactArguments a, Workspace& workspace) {
  const FieldParams& p = a.p;
  // Four blocks to a multiprocessor, unless their sums took more memory than the pairs may.
  constexpr int64_t kFloor = 1 << 20;
  const int64_t filling = 4 * multiprocessors(p), pairs = p.batch * p.count;
  const int64_t most = (pairs < kFloor ? kFloor : pairs) / p.dim;
  a.slots = filling < most ? filling : most < 1 ? 1 : most;
  a.parts = workspace.take<Part>(p.batch < a.slots ? a.slots : p.batch);
  a.sums = workspace.take<double>(a.slots * p.dim);
  const int64_t blocks =
      p.batch < 4 * filling ? (p.batch < a.slots ? a.slots : p.batch) : 4 * filling;
  switch (p.value_type) {
    case ValueType::kFloat32:
      launch_exact<float, Pass>(a, blocks);
      break;
    case ValueType::kFloat64:
      launch_exact<double, Pass>(a, blocks);
      break;
    default:
      launch_exact<uint8_t, Pass>(a, blocks);
  }
  launch(exact_combine_kernel<Pass>, blocks, kExactThreads, a.slots * sizeof(double), a);
}

}  // namespace
}  // namespace pfgm
