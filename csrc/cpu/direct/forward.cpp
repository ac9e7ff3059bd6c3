// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), in few dimensions and in float (direct.h):
//
//   v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
//
// Threads take tiles of queries and, where these are too few, parts of the references, whose
// states are combined at the end. The nearest reference of each part is weighed again in double.
#include <algorithm>

#include "../common/alike.h"
#include "../common/kernels.h"
#include "direct_low.h"

namespace pfgm {
namespace {

// One query's sums over one part of the references.
struct Part {
  OnlineState state;  // relative to the anchor
  int64_t anchor;
  bool certified;
};

// Whether the weights of some references may be too imprecise.
bool is_steep(const Weights& weights) {
  return weights.weighing != Weighing::kPower || weights.half_k > kMostGentle;
}

struct Pass {
  const FieldParams& p;
  Weights weights;
  int64_t ld, begin, end;  // the references' part
  double crowd;            // as many references err alike
  bool gaussian;
  double off;  // what float rounds of k/2, relative to it
  bool steep;  // whether the weights of some may be too imprecise

  Pass(const FieldParams& p, int64_t begin, int64_t end, double crowd)
      : p(p),
        weights(p.half_k),
        ld(round_up(p.dim, kPad)),
        begin(begin),
        end(end),
        crowd(crowd),
        gaussian(p.half_k == INFINITY),
        off(gaussian ? 0 : std::abs(weights.single / p.half_k - 1)),
        steep(is_steep(weights)) {}

  // References whose distance falls below the scale by more than this, in u, move it: close to it
  // u keeps its precision and logits are small.
  float slack() const {
    if (gaussian) return -1.0f;
    return static_cast<float>(p.half_k > 4 ? -1 / p.half_k : -0.25);
  }
};

inline double squared_distance(const FieldParams& p, const double* x, int64_t j) {
  double sum = 0;
  for (int64_t c = 0; c < p.dim; ++c) {
    const double difference = decode(p, j * p.dim + c) - x[c];
    sum += difference * difference;
  }
  return sum;
}

// A vector of queries.
struct Queries {
  VecF x[kMaxDim];
  VecF nearest;   // squared distance
  VecFInt run;    // the references that it is among
  VecFInt equal;  // how many are as near, which err alike if they are copies
  Scale scale;
  LowScale low_scale;
  bool low = false;                                           // which of the scales counts
  alignas(64) double offset[kFloatLanes], rate[kFloatLanes];  // of s, and 1/(2t²)
  alignas(64) double sum[kFloatLanes], displacement[kMaxDim][kFloatLanes];
  alignas(64) double squares[kFloatLanes];  // of the weights, where the pass is steep

  // Lanes beyond the last query repeat it.
  void start(const FieldParams& p, int64_t first) {
    const int64_t ld = round_up(p.dim, kPad);
    for (int i = 0; i < kFloatLanes; ++i) {
      const int64_t b = first + i < p.batch ? first + i : p.batch - 1;
      const RadialKernel kernel(p.half_k, p.t[b]);
      offset[i] = kernel.offset;
      rate[i] = kernel.inverse_two_t2;
      for (int c = 0; c < p.dim; ++c) x[c][i] = static_cast<float>(p.x[b * ld + c]);
      sum[i] = squares[i] = 0;
      for (int c = 0; c < p.dim; ++c) displacement[c][i] = 0;
      scale.square[i] = INFINITY;
    }
    nearest = scale.origin = broadcast(INFINITY);
    scale.inverse = broadcast(1.0f);
    scale.low = VecF{};
    run = VecFInt{};
    equal = VecFInt{} + 1;
  }

  // The scale for is_low, from the first run of references.
  void fix_scale(const Pass& pass, int64_t first) {
    const FieldParams& p = pass.p;
    low = true;
    for (int i = 0; i < kFloatLanes; ++i) {
      const double* row = p.x + std::min(first + i, p.batch - 1) * pass.ld;
      double distance = INFINITY;
      for (int64_t j = pass.begin; j < std::min(pass.end, pass.begin + kRun); ++j) {
        distance = std::min(distance, squared_distance(p, row, j));
      }
      low_scale.fix(i, distance, offset[i]);
    }
  }

  // What takes the sums to weights relative to a reference at this squared distance.
  double relative_to(double square, int lane, const RadialKernel& kernel) const {
    if (!low) return ::exp(-kernel.relative_logit<ScalarMath>(square, scale.square[lane]));
    const double ratio = (square + offset[lane]) * low_scale.inverse[lane];
    return kernel.half_k * ::pow(ratio, kernel.half_k);
  }

  // Takes note of the nearest reference of a run.
  void admit(VecF smallest, int32_t index) {
    const VecFInt nearer = smallest < nearest;
    nearest = nearer ? smallest : nearest;
    run = nearer ? VecFInt{} + index : run;
  }

  // The same for a block's squared distances; counts the references that are as near.
  void admit_block(const VecF* v, int padded, int32_t first_run) {
    for (int r = 0; r < padded; r += kRun) {
      VecF half[kRun / 2];  // halved again and again: a chain of minima would wait for each
      for (int i = 0; i < kRun / 2; ++i) half[i] = smaller(v[r + i], v[r + kRun / 2 + i]);
      for (int n = kRun / 4; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) half[i] = smaller(half[i], half[n + i]);
      }
      if (!bits(half[0] <= nearest)) continue;
      VecFInt as_near = {};
      for (int i = 0; i < kRun; ++i) as_near -= v[r + i] == half[0];
      equal = half[0] < nearest ? as_near : half[0] == nearest ? equal + as_near : equal;
      admit(half[0], first_run + r / kRun);
    }
  }

  // Moves the scale of the queries that have found a much nearer reference there, and takes their
  // sums along.
  void follow(const Pass& pass) {
    const VecFInt fallen = (nearest - scale.origin) * scale.inverse < pass.slack();
    if (!bits(fallen)) return;
    const Scale old = scale;
    scale.move(fallen ? nearest : scale.origin, offset, rate, pass.gaussian);
    for (int i = 0; i < kFloatLanes; i += kLanes) {
      const Vec from = load(old.square + i), to = load(scale.square + i), before = load(sum + i);
      const Vec logit = pass.gaussian
                            ? (to - from) * load(rate + i)
                            : log1p((from - to) / (to + load(offset + i))) * -pass.p.half_k;
      const Vec factor = before == 0.0 ? Vec{} : exp(logit);
      store(sum + i, before * factor);
      store(squares + i, load(squares + i) * factor * factor);
      for (int c = 0; c < pass.p.dim; ++c) {
        store(displacement[c] + i, load(displacement[c] + i) * factor);
      }
    }
  }
};

template <Weighing kWeighing>
void add_block(const Pass& pass, const DirectBlock& block, int32_t first_run, Queries& queries) {
  alignas(64) VecF v[kBlock];
  squared_distances(block, queries.x, v);
  queries.admit_block(v, block.padded, first_run);
  queries.follow(pass);
  constexpr int kGroup = 8;  // for instruction-level parallelism
  for (int r = 0; r < block.padded; r += kGroup) {
    pass.weights.weigh<kWeighing, kGroup>(queries.scale, v + r);
  }
  for (int r = block.count; r < block.padded; ++r) v[r] = VecF{};
  if (pass.steep) {
    VecF squares[kGroup] = {};
    for (int r = 0; r < block.padded; r += kGroup) {
      for (int i = 0; i < kGroup; ++i) squares[i] += v[r + i] * v[r + i];
    }
    for (int i = kGroup / 2; i > 0; i /= 2) {
      for (int n = 0; n < i; ++n) squares[n] += squares[n + i];
    }
    accumulate(queries.squares, squares[0]);
  }
  gather(block, queries.x, v, queries.sum, queries.displacement);
}

template <int kDim, int k>
void add_block_low(const DirectBlock& block, int32_t first_run, Queries& queries) {
  PairwiseSums<kDim + 1> total;
  for (int r = 0; r < block.count; r += kRun) {
    LowRun<kDim> run;
    const float* row = block.rows + r * kDim;
    const int n = block.count - r;
    n >= kRun ? run.template add<k>(row, kRun, queries.x, queries.low_scale)
              : run.template add<k>(row, n, queries.x, queries.low_scale);
    total.add(run.sums);
    queries.admit(run.nearest, first_run + r / kRun);
  }
  const VecF* sums = total.total();
  for (int c = 0; c < kDim; ++c) accumulate(queries.displacement[c], sums[c]);
  accumulate(queries.sum, sums[kDim]);
}

// What the references beside a query's nearest have of the weight: in sum and as a root of the sum
// of squares, at most. way: ‖v‖, of all.
struct Others {
  double share, root, way;
};

// Whether the weights of the others are precise enough for the log mass and for v, which hold what
// float rounds of them to the extent that they are of them.
bool precise(const Pass& pass, const RadialKernel& kernel, double distance, Others others) {
  if (!pass.steep || others.share <= 0) return true;
  const double nearest = 1 - others.share;
  const double count = static_cast<double>(pass.end - pass.begin - 1);
  struct Depth {
    double depth;   // of a logit below the nearest's; if it is that of all the others,
    double slope;   // the slope of a logit times its squared distance
    double extent;  // how much of log mass and v is theirs
    double away;    // ‖v‖, relative to their distance
  };
  const auto at = [&](double ratio) -> Depth {
    const double depth = std::max(::log(nearest * ratio), 0.0);
    const double square = kernel.farthest(distance, depth), moment = others.share * ::sqrt(square);
    return {depth, kernel.slope(square) * square, moment / (nearest * ::sqrt(distance) + moment),
            others.way / ::sqrt(square)};
  };
  // On average they are, at most, where all share the weight evenly; or weighted by their squares.
  const Depth all = at(count / others.share);
  const double alike = std::min(::sqrt(pass.crowd) * others.root / others.share, 1.0);
  const Depth own = alike < 1 ? at(others.share / (others.root * others.root)) : all;
  const double logarithm = pass.weights.weighing == Weighing::kLogarithm ? own.depth : 0;
  const double rounding =
      own.slope * kSquareRounding + logarithm * kLogarithmRounding + kWeightRounding;
  // What is the same in all differences moves the query: towards all that lie on one side of it.
  const double side = std::clamp(all.away, kAmid, 1.0);
  const double digits = kQueryRounding * std::min(2 / ::sqrt(pass.p.dim), 1.0) * side;
  const double common = (digits * all.slope + pass.off * all.depth) * all.extent;
  const double tolerance = kTolerance + (kCrowdTolerance - kTolerance) * alike;
  return ::hypot(common, 4 * rounding * alike * own.extent) <= tolerance;
}

// Completes a query's part: sums become relative to the nearest reference, whose weight in them,
// nearest_weight, is put right.
void finish(const Pass& pass, const Queries& queries, int lane, double nearest_weight, int64_t b,
            Part* part, double* displacement) {
  const FieldParams& p = pass.p;
  const double* x = p.x + b * pass.ld;
  const RadialKernel kernel(p.half_k, p.t[b]);
  int64_t anchor = 0;
  double distance = INFINITY;
  const int64_t first = pass.begin + int64_t{queries.run[lane]} * kRun;
  for (int64_t j = first; j < first + kRun && j < pass.end; ++j) {
    const double square = squared_distance(p, x, j);
    if (!(square < distance)) continue;
    distance = square;
    anchor = j;
  }
  const double factor = queries.relative_to(distance, lane, kernel);
  const double correction = 1 - factor * nearest_weight;
  part->state.nearest = distance;
  part->state.sum = factor * queries.sum[lane] + correction;
  part->anchor = anchor;
  double finite = part->state.sum - part->state.sum, square_of_sums = 0;
  for (int c = 0; c < p.dim; ++c) {
    const double difference = decode(p, anchor * p.dim + c) - x[c];
    displacement[c] = factor * queries.displacement[c][lane] + correction * difference;
    finite += displacement[c] - displacement[c];
    square_of_sums += displacement[c] * displacement[c];
  }
  for (int64_t c = p.dim; c < pass.ld; ++c) displacement[c] = 0;
  // What the correction would be for all others that may be copies of the nearest.
  const double share = 1 / part->state.sum, copies = queries.equal[lane] - 1;
  const double off = std::abs(correction) * std::min(1 - share, copies * share);
  const double square = nearest_weight * nearest_weight, squares = queries.squares[lane] - square;
  const double root = squares > 0 ? factor * share * ::sqrt(squares) : 1;
  const double way = share * ::sqrt(square_of_sums);
  const bool faint = 1 - share * (copies + 1) < kFaint && distance < kFaint * way * way;
  part->certified = finite == 0 && !faint && fits_float(kernel, distance) &&
                    off <= kCrowdTolerance &&
                    precise(pass, kernel, distance, {1 - share, root, way});
}

// Calls add(block, index of its first run, queries) for the blocks of the pass and vectors of up to
// kQueries queries.
template <class Add>
void for_blocks(const Pass& pass, Queries* queries, int vectors, const Add& add) {
  DirectBlock block;
  for (int64_t first = pass.begin; first < pass.end; first += kBlock) {
    block.load(pass.p, first, clamp_size(pass.end - first, kBlock));
    const int32_t first_run = static_cast<int32_t>((first - pass.begin) / kRun);
    for (int i = 0; i < vectors; ++i) add(block, first_run, queries[i]);
  }
}

void forward_tile(const Pass& pass, int64_t start, int size, Part* parts, double* displacements) {
  Queries queries[kTileVectors];
  VecF nearest_weights[kTileVectors];
  const int vectors = (size + kFloatLanes - 1) / kFloatLanes;
  const bool low = is_low(pass.p);
  for (int i = 0; i < vectors; ++i) {
    queries[i].start(pass.p, start + i * kFloatLanes);
    if (low) queries[i].fix_scale(pass, start + i * kFloatLanes);
  }
  if (low) {
    dispatch_low(pass.p.dim, pass.weights.k, [&](auto dim, auto power) {
      constexpr int kDim = decltype(dim)::value, kPower = decltype(power)::value;
      for_blocks(pass, queries, vectors, add_block_low<kDim, kPower>);
      for (int i = 0; i < vectors; ++i) {
        nearest_weights[i] = queries[i].low_scale.weight<kPower>(queries[i].nearest);
      }
    });
  } else {
    dispatch(pass.weights.weighing, [&](auto weighing) {
      constexpr Weighing kWeighing = decltype(weighing)::value;
      for_blocks(pass, queries, vectors, [&](const auto& block, int32_t first_run, Queries& some) {
        add_block<kWeighing>(pass, block, first_run, some);
      });
      for (int i = 0; i < vectors; ++i) {
        nearest_weights[i] = queries[i].nearest;
        pass.weights.weigh<kWeighing, 1>(queries[i].scale, &nearest_weights[i]);
      }
    });
  }
  for (int q = 0; q < size; ++q) {
    const int i = q / kFloatLanes, lane = q % kFloatLanes;
    finish(pass, queries[i], lane, nearest_weights[i][lane], start + q, parts + q,
           displacements + q * pass.ld);
  }
}

// How many references may err alike: as many as coincide, or all.
double crowd_of(const FieldParams& p) {
  constexpr double kClose = 1e-6;
  if (has_few_values(p)) return INFINITY;
  const double pairs = static_cast<double>(coinciding_pairs(p, kClose, nullptr, kSampleRows));
  const double share = std::max(static_cast<double>(p.count) / kSampleRows, 1.0);
  return pairs == 0 ? 1 : (pairs + 1) * share;
}

// Combines the parts of query b, a tile apart, and normalises; false where one is not certified.
bool combine(const FieldParams& p, int64_t b, const Part* parts, const double* displacements,
             int64_t num_parts) {
  const int64_t ld = round_up(p.dim, kPad);
  const RadialKernel kernel(p.half_k, p.t[b]);
  OnlineState state;
  int64_t anchor = 0;
  double* displacement = p.displacement + b * ld;
  for (int64_t c = 0; c < ld; ++c) displacement[c] = 0;
  for (int64_t i = 0; i < num_parts; ++i) {
    const Part& part = parts[i * kQueries];
    if (!part.certified) return false;
    if (part.state.nearest < state.nearest) anchor = part.anchor;
    const auto factors = state.merge(part.state, kernel);
    for (int64_t c = 0; c < ld; ++c) {
      displacement[c] =
          factors.own * displacement[c] + factors.theirs * displacements[i * kQueries * ld + c];
    }
  }
  for (int64_t c = 0; c < ld; ++c) displacement[c] /= state.sum;
  p.anchor[b] = anchor;
  p.log_mass[b] = kernel.logit(state.nearest) + ::log(state.sum);
  p.anchor_log_weight[b] = -::log(state.sum);
  return true;
}

}  // namespace

void PFGM_ISA::direct_forward(const FieldParams& p, uint8_t* uncertified) {
  const int64_t ld = round_up(p.dim, kPad);
  const Shares shares = direct_shares(p);
  const double crowd = is_steep(Weights(p.half_k)) ? crowd_of(p) : 1;
  const Buffer<Part> parts(shares.size() * kQueries);
  const Buffer<double> displacements(shares.size() * kQueries * ld);
  parallel_for(p.num_threads, shares.count(), [&](int64_t share, int) {
    shares.for_pieces(share, [&](int64_t n) {
      const Piece& piece = shares.pieces[n];
      const int64_t start = piece.tile * kQueries, out = n * kQueries;
      const Pass pass(p, piece.first, piece.last, crowd);
      forward_tile(pass, start, clamp_size(p.batch - start, kQueries), parts.get() + out,
                   displacements.get() + out * ld);
    });
  });
  parallel_for(p.num_threads, p.batch, [&](int64_t b, int) {
    const int64_t* ends = shares.tiles.data() + b / kQueries;
    const int64_t from = ends[0] * kQueries + b % kQueries;
    uncertified[b] =
        !combine(p, b, parts.get() + from, displacements.get() + from * ld, ends[1] - ends[0]);
  });
}

}  // namespace pfgm
