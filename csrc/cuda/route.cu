// SPDX-License-Identifier: Apache-2.0
// Which references of a query are taken how. With r_j and the offset of a query from
//
//     ‖x − x0_j‖² / unit² = r_j + offset,   r_j = ‖y_j‖² − centre − 2 x'·y_j   (operands.cu)
//
// and r_j known to some error, a reference can carry weight only if r_j ≤ cut. Of those
//
//     r_j ≤ limit           are taken by direct differences in double,
//     limit < r_j ≤ cut     by tensor cores (weigh.cu, products_sum.cu).
//
// Where few references can carry weight, or where the error of r is not certain to be small enough
// for weights, limit = cut. Else the limit leaves to direct differences what holds more than 1/64
// of the weight. Where float does not hold the squares, or is not finite, limit is NaN: all
// references.
#include "float_math.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

constexpr int kFew = 64;  // candidates up to which a query is always finished by direct differences
constexpr double kHeavy = 64;         // one over the share of the weight that is left to these
constexpr double kLogitError = 5e-6;  // of a dense sum's logits at most, root mean square
constexpr double kDepth = 16;         // weights below exp(−kDepth)/N of the nearest's are not seen

// What is known of a query before its references are looked at.
struct Query {
  int64_t b;
  RadialKernel kernel;
  double unit, deviation, radius, centre;
  double squared, length;  // ‖x'‖²
  double offset;

  __device__ Query(const TwoPassArguments& a, int64_t b)
      : b(b),
        kernel(a.p.half_k, a.p.t[b]),
        unit(a.p.header[0]),
        deviation(a.p.header[1]),
        radius(a.p.header[3]),
        centre(a.p.header[4]),
        squared(a.squares[b]),
        length(::sqrt(squared)),
        offset(squared + centre - 2 * a.shared[b]) {}
};

// The error of r: certain, by the sizes of all terms, of which 2.4e-7 is four roundings to float;
// and root mean square, of which 3.6e-8 is one, and more where sums are long.
struct Errors {
  double certain, noise;

  // alike: what all errors share.
  __device__ Errors(const TwoPassArguments& a, const Query& q, double nearest, double alike) {
    const double d = static_cast<double>(a.p.dim);
    // Two parts leave 2⁻¹⁷ of a number at most, usually half of it. The product of the low parts,
    // 2⁻⁸ of a number each, is left out. Three parts hold a float: its rounding is what is left.
    const double left = a.num_parts == 3 ? 0x1p-24 : 0x1p-17;
    const double split = a.p.num_parts == 1 ? left : 4 * left;
    const double summed = kMaxPromotion * kCut + d / 64 * 0x1p-23;
    certain = 2 * q.length * q.radius * (split + summed) +
              2.4e-7 * q.radius * (q.radius + 2 * q.length) +
              2 * q.deviation * (q.radius + q.length);
    const double product = (::fabs(nearest) + ::fabs(q.centre) + q.radius * q.radius) / 2;
    noise = (q.length * q.radius * left / 2 + q.deviation * (q.length + q.radius)) / ::sqrt(d);
    noise = ::fmax(2 * (noise + product * 3.6e-8 * ::sqrt(1 + d / 192)), alike);
  }
};

// Calls body(r) for a query's references with r ≤ limit, each in one thread.
template <class Body>
__device__ void for_each_within(const TwoPassArguments& a, int64_t b, float limit, Body body) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t tile = threadIdx.x / kWarp; tile < a.tiles; tile += kWarps) {
    if (!(a.minima[b * a.tiles + tile] <= limit)) continue;
    PFGM_UNROLL
    for (int i = 0; i < kTile / kWarp; ++i) {
      const int64_t j = tile * kTile + i * kWarp + lane;
      const float r = j < a.p.count ? a.r[b * a.pitch + j] : NAN;
      if (r <= limit) body(r);
    }
  }
}

__device__ float smallest_r(const TwoPassArguments& a, int64_t b) {
  float smallest = INFINITY;
  for (int64_t tile = threadIdx.x; tile < a.tiles; tile += kThreads) {
    smallest = Least()(smallest, a.minima[b * a.tiles + tile]);
  }
  return block_reduce(smallest, Least());
}

// The first reference whose r is `nearest`; any where there is none, which a NaN brings about.
__device__ int64_t find_anchor(const TwoPassArguments& a, int64_t b, float nearest) {
  int64_t tile = a.tiles - 1;
  for (int64_t i = threadIdx.x; i < tile; i += kThreads) {
    if (a.minima[b * a.tiles + i] == nearest) tile = i;
  }
  tile = block_reduce(tile, Least());
  int64_t anchor = a.p.count - 1;
  const int64_t j = tile * kTile + threadIdx.x;
  if (threadIdx.x < kTile && j < anchor && a.r[b * a.pitch + j] == nearest) anchor = j;
  return block_reduce(anchor, Least());
}

// The squared distance of a reference, by direct differences.
__device__ double exact_square(const TwoPassArguments& a, const Query& q, int64_t j) {
  double square = 0;
  for (int64_t column = threadIdx.x; column < a.p.dim; column += kThreads) {
    const double difference =
        decode(a.p, j * a.p.dim + column) - load_query(a.p, q.b * a.p.dim + column);
    square += difference * difference;
  }
  return block_reduce(square, Sum());
}

// What all errors share moves the log mass: what sums of columns lose (kernel_traits.cuh) may be a
// tenth as large as what differs. And the anchor shows an error of its own, of which parts are
// little where there are three.
__device__ double shared_error(const TwoPassArguments& a, const Query& q, double nearest,
                               int64_t anchor, double base) {
  const double lost = kCut * ::fabs(a.p.squares[anchor] - nearest);
  const double off = ::fabs(nearest + q.offset - base / (q.unit * q.unit));
  return ::fmax(10 * lost, a.num_parts == 3 ? 2.5 * off : off);
}

// How logits are formed of r.
struct Scales {
  double exact, origin;  // u = (r − origin) exact
  float origin_high, origin_low, inverse;
  float half_k, correction;
  bool gaussian;

  __device__ Scales(const Query& q, double slope, double base)
      : exact(slope * q.unit * q.unit / (q.kernel.gaussian ? 1 : q.kernel.half_k)),
        origin(base / (q.unit * q.unit) - q.offset),
        gaussian(q.kernel.gaussian) {
    const double factor = gaussian ? 1 : q.kernel.half_k;
    origin_high = static_cast<float>(origin);
    origin_low = static_cast<float>(origin - origin_high);
    inverse = static_cast<float>(exact);
    half_k = static_cast<float>(factor);
    correction = static_cast<float>(factor * (exact / inverse) - half_k);
  }

  __device__ float weight(float r) const {
    const float u = Least()(((r - origin_high) - origin_low) * inverse, 1e30f);
    return ::expf(logit_float(u, half_k, correction, gaussian));
  }
};

// The largest r that can carry weight, exp(−depth) of that of the smallest r or of base; NaN where
// float does not hold the squares.
__device__ float largest_r(const TwoPassArguments& a, const Query& q, const Errors& errors,
                           double nearest, double base, double depth) {
  const double square = q.unit * q.unit;
  const double least =
      a.backward ? (base > 1e300 ? 1e300 : base) : (nearest + errors.certain + q.offset) * square;
  const double cut = q.kernel.farthest(least, depth) / square - q.offset + errors.certain;
  const bool usable = q.squared + q.kernel.offset / square < 1e30 && q.radius < 1e15;
  const float rounded = static_cast<float>(usable ? cut : NAN);
  return rounded + ::fabsf(rounded) * 2e-7f;  // what rounding took off
}

// Leaves references to the products: those within the cut but with less than exp(−heavy) of the
// weight, which is relative to all weight in the forward pass.
__device__ void leave_light(const TwoPassArguments& a, const Query& q, double slope, double base,
                            float cut, double heavy) {
  const Scales scales(q, slope, base);
  if (!a.backward) {
    double total = 0;
    for_each_within(a, q.b, cut, [&](float r) { total += scales.weight(r); });
    heavy -= ::log(block_reduce(total, Sum()));
  }
  if (threadIdx.x != 0) return;
  a.base[q.b] = base;
  a.cut[q.b] = cut;
  const double farthest = q.kernel.farthest(base, heavy);
  a.left.set(q.b, static_cast<float>(farthest / (q.unit * q.unit) - q.offset));
  const int64_t batch = a.p.batch;
  a.scales[q.b] = scales.origin_high;
  a.scales[batch + q.b] = scales.origin_low;
  a.scales[2 * batch + q.b] = scales.inverse;
  a.scales[3 * batch + q.b] = scales.correction;
}

// A block of threads takes a query: limit and cut, and what its logits are formed with.
__global__ void __launch_bounds__(kThreads)
    route_kernel(const __grid_constant__ TwoPassArguments a) {
  const int64_t b = blockIdx.x;
  const Query q(a, b);
  const float nearest = smallest_r(a, b);
  double depth = log_count(a.p) + kDepth, heavy = ::log(kHeavy), base;
  double alike = 0;
  if (a.backward) {
    base = a.p.anchor_square[b];
    depth += a.p.anchor_log_weight[b];
    heavy += a.p.anchor_log_weight[b];
  } else {
    const int64_t anchor = find_anchor(a, b, nearest);
    base = exact_square(a, q, anchor);
    alike = shared_error(a, q, nearest, anchor, base);
    if (threadIdx.x == 0) a.p.anchor[b] = anchor;
  }
  const Errors errors(a, q, nearest, alike);
  const double slope = q.kernel.slope(base);
  const float cut = largest_r(a, q, errors, nearest, base, depth);

  int64_t count = 0;  // none where the cut is NaN
  for_each_within(a, b, cut, [&](float) { ++count; });
  count = block_reduce(count, Sum());
  const double distance = ::sqrt(base);
  if (count > kFew && slope * q.unit * q.unit * errors.noise <= kLogitError && a.p.header[2] == 0 &&
      distance >= q.unit * ::fmax(q.radius / (a.backward ? 64 : 4), q.deviation * 1e6)) {
    leave_light(a, q, slope, base, cut, heavy);
  } else if (threadIdx.x == 0) {
    a.base[b] = NAN;
    a.left.set(b, cut);
    a.cut[b] = -INFINITY;
  }
}

}  // namespace

void route(const TwoPassArguments& a) {
  launch(route_kernel, a.p.batch, kThreads, kReductionBytes, a);
}

}  // namespace pfgm
