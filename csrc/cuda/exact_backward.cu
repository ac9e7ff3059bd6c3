// SPDX-License-Identifier: Apache-2.0
// Gradients by direct differences in double, with the cotangents g of the displacement and g_m of
// the log mass:
//
//   a_j = g·(x0_j − x) − g·v + g_m,  c_j = (k/2) w_j a_j/s_j        (k = ∞: c_j = w_j a_j/(2t²))
//   dx = 2 Σ_j c_j (x0_j − x),  dt = −2t Σ_j c_j           (k = ∞: (2/t) Σ_j c_j ‖x − x0_j‖²)
//   dx0_j = Σ_b w_j g + 2 c_j (x − x0_j)
//
// Weights follow from the squared distance and log w of the anchor.
#include "exact.cuh"

namespace pfgm {
namespace {

struct BackwardPass {
  static constexpr bool kPull = true;

  const ExactArguments& a;
  double sum = 0;

  __device__ BackwardPass(const ExactArguments& a, const Task&) : a(a) {}

  // What belongs to the query is read anew each time: there are no registers to keep it in.
  __device__ double weigh(const Task& task, const int* rows, int count, Scratch& scratch,
                          bool& heavy) {
    if (static_cast<int>(threadIdx.x) < count) {
      const FieldParams& p = a.p;
      const int64_t b = task.b;
      const RadialKernel kernel(p.half_k, p.t[b]);
      const double square = scratch.squares[threadIdx.x], base = p.anchor_square[b];
      double w = 0, c = 0;
      // At the singular point all gradients are zero.
      if (!kernel.singular(base)) {
        w = ::exp(kernel.relative_logit<ScalarMath>(square, base) + p.anchor_log_weight[b]);
      }
      if (w <= ::exp(-kCutoff - log_count(p))) {
        w = 0;
      } else {
        const double pull = scratch.pull[threadIdx.x] - p.projection[b] + p.grad_log_mass[b];
        c = w * pull * kernel.slope(square);
        sum += kernel.gaussian ? c * square : c;
      }
      scratch.weights[threadIdx.x] = 2 * c;
      heavy = c != 0;
      if (a.weights != nullptr) {
        const int64_t pair = b * p.count + task.begin + rows[threadIdx.x];
        a.weights[pair] = w;
        a.coefficients[pair] = c;
      }
    }
    return 1;
  }

  __device__ Part finish(Scratch& scratch) const {
    return {0, block_sum(sum, scratch.partial), 0, false};
  }

  __device__ static void combine(const ExactArguments& a, int64_t b, const Part* parts, int count,
                                 double* factors, bool write) {
    for (int i = threadIdx.x; i < count; i += kExactThreads) factors[i] = 1;
    __syncthreads();
    if (!write || threadIdx.x != 0) return;
    double sum = 0;
    for (int i = 0; i < count; ++i) {
      if (!parts[i].empty) sum += parts[i].sum;
    }
    const double t = a.p.t[b];
    a.p.dt[b] += sum * (a.p.half_k == INFINITY ? 2 / t : -2 * t);
  }
};

// A thread owns a column and kOwn references, a block `width` columns.
constexpr int kOwn = 4;

struct ReferencesArguments {
  FieldParams p;
  const double* weights;       // (B, N)
  const double* coefficients;  // (B, N)
  int width;
};

template <class Stored>
__global__ void __launch_bounds__(kExactThreads)
    references_kernel(const __grid_constant__ ReferencesArguments a) {
  const FieldParams& p = a.p;
  const int64_t blocks = (p.dim + a.width - 1) / a.width, groups = kExactThreads / a.width;
  const int64_t c = blockIdx.x % blocks * a.width + threadIdx.x % a.width;
  const int64_t first = (blockIdx.x / blocks * groups + threadIdx.x / a.width) * kOwn;
  if (c >= p.dim || first >= p.count) return;
  const int count = p.count - first < kOwn ? static_cast<int>(p.count - first) : kOwn;
  Stored* const out = static_cast<Stored*>(p.dvalues) + first * p.dim + c;
  double y[kOwn], sums[kOwn] = {};
  PFGM_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    y[i] = load_value<Stored>(p, (first + (i < count ? i : 0)) * p.dim + c);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const double g = p.grad_displacement[b * p.dim + c], x = load_query(p, b * p.dim + c);
    const int64_t pair = b * p.count + first;
    PFGM_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (i < count) {
        sums[i] += a.weights[pair + i] * g + 2 * a.coefficients[pair + i] * (x - y[i]);
      }
    }
  }
  PFGM_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    if (i < count) out[i * p.dim] = static_cast<Stored>(sums[i]);
  }
}

void references_backward(const ReferencesArguments& a) {
  const FieldParams& p = a.p;
  const int64_t rows = kExactThreads / a.width * kOwn;
  const int64_t blocks = divide_up(p.count, rows) * divide_up(p.dim, a.width);
  const bool single = p.value_type == ValueType::kFloat32;
  launch(single ? references_kernel<float> : references_kernel<double>, blocks, kExactThreads, 0,
         a);
}

}  // namespace

void exact_backward(const FieldParams& p, Workspace& workspace, const Left& left, const float* r) {
  ExactArguments a{};
  a.p = p;
  a.left = left;
  a.r = r;
  a.result = p.dx;
  const int64_t pairs = p.dvalues == nullptr ? 0 : p.batch * p.count;
  if (p.dvalues != nullptr) {
    a.weights = workspace.take<double>(pairs);
    a.coefficients = workspace.take<double>(pairs);
  }
  run_exact<BackwardPass>(a, workspace);
  if (p.dvalues == nullptr) return;
  int width = 1;
  while (width < p.dim && width < 32) width *= 2;
  references_backward({p, a.weights, a.coefficients, width});
}

}  // namespace pfgm
