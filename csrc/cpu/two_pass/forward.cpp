// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), for larger d and float32 queries, in the passes of
// two_pass.h. In the second one
//
//   logit_j = −(k/2) log1p((s_j − s_a)/s_a)
//
// relative to an anchor a near the nearest, with s_a exactly, and Σ_j w_j (x0_j − x) is a second
// product. References that hold much of the weight are again taken by direct differences.
#include "two_pass.h"

namespace pfgm {
namespace {

// What weights in a sample may be off by on average, which moves the log mass; and root mean
// square: where some references err alike, and others the other way, 0.7 of that shows in a
// displacement.
constexpr double kSampledMean = 6e-7, kSampledDeviation = 1e-6;
// What gradients multiply a displacement by, times what it is off by where errors are independent.
constexpr double kDisplacementPull = 1e-5;
constexpr double kAlikePull = 3e-5;  // of which a third is seen, of ‖g‖

struct Forward : TwoPass {
  using TwoPass::TwoPass;

  double limit(const Bound& bound, int64_t b, double smallest) const override {
    return cutoff(p, o, b, bound.offset, smallest);
  }

  void finish_sparse(std::vector<SparseQuery>& queries) const override {
    finish_all(reader, nullptr, queries,
               [&](const SparseQuery& query) { finish_sparse_forward(p, reader, query); });
  }

  double anchor_square(int64_t b, int64_t nearest) const override {
    p.anchor[b] = nearest;
    return exact_square(b, nearest);
  }

  void finish_dense(const SecondPass& pass) const override {
    pass.weigh();
    const size_t size = pass.tiles.rows.size();
    std::vector<double> rest(size);  // weight of the references that are not heavy
    std::vector<std::vector<int32_t>> heavy(size);
    pass.for_queries([&](int64_t i, int64_t b) {
      const double square = pass.anchors.squares[i], total = pass.total(pass.block_sums, i);
      const RadialKernel kernel(p.half_k, p.t[b]);
      rest[i] = take_heavy(pass, i, total, heavy[i]);
      const Errors errors = pass.sample(pass.block_sums, i, [&](int64_t j, double weight) {
        return kernel.relative_weight(exact_square(b, j), square) / weight - 1;
      });
      const double share = rest[i] / total, root = ::sqrt(share * kHeavy);  // of Σ w², at most
      const double pull = 2 * kernel.slope(square) * square / ::sqrt(static_cast<double>(p.dim));
      uncertified[b] = !(std::abs(errors.mean) * share <= kSampledMean &&
                         errors.root_mean_square * share <= kSampledDeviation &&
                         errors.root_mean_square * root * pull <= kDisplacementPull);
    });
    const Buffer<double> sums = pass.gather();
    pass.for_queries([&](int64_t i, int64_t b) {
      finish(b, pass.anchors.squares[i], rest[i], heavy[i], sums.get() + i * p.dim);
    });
  }

  double exact_square(int64_t b, int64_t j) const {
    return pair_sums(reader, p.x + b * round_up(p.dim, kPad), nullptr, j).distance;
  }

  // Takes the heavy references out of the weights and their sums; returns the weight of the others.
  double take_heavy(const SecondPass& pass, int64_t i, double total,
                    std::vector<int32_t>& heavy) const {
    if (total * kHeavy > 2) return total;  // the anchor itself, of weight about 1, is not heavy
    float* weights = pass.weights(i);
    const int64_t width = pass.tiles.width(i / kTileQueries);
    for (int64_t block = 0; block < pass.num_blocks; ++block) {
      double& sum = pass.block_sums[block * pass.tiles.padded() + i];
      if (sum <= total * kHeavy) continue;
      const int64_t first = block * pass.block_rows;
      for (int64_t j = first; j < std::min(p.count, first + pass.block_rows); ++j) {
        float& weight = weights[j * width];
        if (weight <= total * kHeavy) continue;
        heavy.push_back(static_cast<int32_t>(j));
        sum = std::max(0.0, sum - weight);
        weight = 0;
      }
    }
    return pass.total(pass.block_sums, i);
  }

  void finish(int64_t b, double anchor_square, double rest, const std::vector<int32_t>& heavy,
              const double* sums) const {
    const int64_t ld = round_up(p.dim, kPad);
    const RadialKernel kernel(p.half_k, p.t[b]);
    const double* x = p.x + b * ld;
    double* displacement = p.displacement + b * ld;
    std::fill(displacement, displacement + ld, 0.0);
    for (int64_t c = 0; c < p.dim; ++c) {
      displacement[c] = o.unit * sums[c] + rest * (o.origin[c] - x[c]);
    }
    double total = rest;
    for (const int32_t j : heavy) {
      const double weight = kernel.relative_weight(exact_square(b, j), anchor_square);
      total += weight;
      add_row(reader, x, j, weight, displacement);
    }
    for (int64_t c = 0; c < p.dim; ++c) displacement[c] /= total;
    const double distance = ::sqrt(anchor_square);
    if (!resolves(p, o, displacement, distance)) uncertified[b] = 1;
    // Gradients multiply v by g (x0_j − x)/s, and what sums of equal terms round is in all of them.
    const double pull = 2 * kernel.slope(anchor_square) * distance;
    const double lost = kRounding * o.unit * o.radius * rest / total;
    if (o.alike && !(pull * lost <= kAlikePull)) uncertified[b] = 1;
    p.log_mass[b] = kernel.logit(anchor_square) + ::log(total);
    p.anchor_log_weight[b] = -::log(total);
  }
};

}  // namespace

void PFGM_ISA::two_pass_forward(const FieldParams& p, uint8_t* uncertified) {
  Forward(p, uncertified).run();
}

}  // namespace pfgm
