// SPDX-License-Identifier: Apache-2.0
// What is done of each query before and after the sums over references (pfgm_kernels/rows.py), as
// cpu/rows.cpp does it.
#include "two_pass.cuh"

namespace pfgm {
namespace {

constexpr int kMostLanes = 256;
static_assert(kMostLanes == kThreads, "a whole block at most takes a query");

struct RowArguments {
  FieldParams p;
  int lanes;  // to a query, a power of two
};

__device__ double load(const void* values, bool single, int64_t index) {
  return single ? static_cast<const float*>(values)[index]
                : static_cast<const double*>(values)[index];
}

__device__ void store(void* values, bool single, int64_t index, double value) {
  if (single) {
    static_cast<float*>(values)[index] = static_cast<float>(value);
  } else {
    static_cast<double*>(values)[index] = value;
  }
}

// A query, of which a thread takes every lanes-th column.
struct Row {
  const FieldParams& p;
  int lanes, lane;
  int64_t b;

  __device__ explicit Row(const RowArguments& a)
      : p(a.p), lanes(a.lanes), lane(static_cast<int>(threadIdx.x) % a.lanes) {
    b = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  }

  __device__ bool inside() const { return b < p.batch; }
  __device__ int64_t end() const { return inside() ? p.dim : 0; }

  // Σ v over the lanes, the same in all of them.
  __device__ double sum(double v) const {
    return lanes == kThreads ? block_reduce(v, Sum()) : warp_sum(v, lanes);
  }

  __device__ double to_anchor(int64_t c) const {
    return decode(p, p.anchor[b] * p.dim + c) - load_query(p, b * p.dim + c);
  }
};

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ RowArguments a) {
  const Row row(a);
  const FieldParams& p = a.p;
  const bool field = p.output == Output::kField;
  double factor = 1;
  if (field) {
    double square = 0;
    for (int64_t c = row.lane; c < row.end(); c += row.lanes) {
      const double v = p.displacement[row.b * p.dim + c];
      square += v * v;
    }
    square = row.sum(square);
    if (row.inside()) factor = field_factor(p, ::hypot(::sqrt(square), p.t[row.b]));
  }
  const int64_t columns = p.dim + (field ? 1 : 0);
  for (int64_t c = row.lane; c < row.end(); c += row.lanes) {
    const int64_t at = row.b * p.dim + c;
    const double v = p.displacement[at];
    const double value = p.output == Output::kMean ? load_query(p, at) + v : v * factor;
    store(p.result, p.result_single, row.b * columns + c, value);
    if (p.residual != nullptr) store(p.residual, p.result_single, at, v - row.to_anchor(c));
  }
  if (field && row.inside() && row.lane == 0) {
    store(p.result, p.result_single, row.b * columns + p.dim, -p.t[row.b] * factor);
  }
}

__global__ void __launch_bounds__(kThreads) begin_kernel(const __grid_constant__ RowArguments a) {
  const Row row(a);
  const FieldParams& p = a.p;
  const bool field = p.output == Output::kField;
  const int64_t columns = p.dim + (field ? 1 : 0);
  const auto cotangent = [&](int64_t c) {
    return p.result == nullptr ? 0 : load(p.result, p.result_single, row.b * columns + c);
  };
  double square = 0, length = 0, along = 0, apart = 0;
  for (int64_t c = row.lane; c < row.end(); c += row.lanes) {
    const double difference = row.to_anchor(c);
    const double v = difference + load(p.residual, p.result_single, row.b * p.dim + c);
    square += difference * difference;
    apart += difference != 0;
    length += v * v;
    along += cotangent(c) * v;
  }
  square = row.sum(square);
  apart = row.sum(apart);
  length = row.sum(length);
  along = row.sum(along);

  const double t = row.inside() ? p.t[row.b] : 1;
  const bool singular = t == 0 && apart == 0 && p.half_k != INFINITY;
  const double last = field && row.inside() ? cotangent(p.dim) : 0;
  const ResultCotangent pull(p, t, singular, length, along, last);
  double projection = 0;
  for (int64_t c = row.lane; c < row.end(); c += row.lanes) {
    const int64_t at = row.b * p.dim + c;
    const double v = row.to_anchor(c) + load(p.residual, p.result_single, at);
    const double g = pull.of_v(cotangent(c), v);
    p.grad_displacement[at] = g;
    p.dx[at] = p.output == Output::kMean ? 0 : -g;
    projection += g * v;
  }
  projection = row.sum(projection);
  if (!row.inside() || row.lane != 0) return;
  p.projection[row.b] = projection;
  p.anchor_square[row.b] = square;
  p.grad_log_mass[row.b] = singular || p.log_mass == nullptr ? 0 : p.log_mass[row.b];
  p.dt[row.b] = pull.of_t(p, last, t);
}

int64_t launch_rows(void (*kernel)(RowArguments), const FieldParams& p) {
  if (p.batch == 0) return 0;  // torch gives no addresses of empty tensors
  const DeviceGuard guard(p.device);
  RowArguments a{p, 1};
  while (a.lanes < p.dim && a.lanes < kWarp) a.lanes *= 2;
  if (p.dim > kMostLanes) a.lanes = kThreads;
  launch(kernel, divide_up(p.batch, kThreads / a.lanes), kThreads, kReductionBytes, a);
  return 1;
}

}  // namespace

int64_t field_finish_cuda(const FieldParams& p) { return launch_rows(finish_kernel, p); }

int64_t field_begin_cuda(const FieldParams& p) { return launch_rows(begin_kernel, p); }

}  // namespace pfgm
