// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), for 24 < d ≤ 256 and float32 queries, in one pass
// with an online state (fused.h). Weights are relative to the smallest r so far,
//
//   w_j = exp(−(k/2) log1p((r_j − r_min) unit²/s_min)),   s_min = unit² (r_min + offset) + t²
//
// where s_min need not be the s of a reference exactly: it is what all logits refer to. References
// that hold much of the weight are left out of the products and taken by direct differences.
#include "fused.h"

namespace pfgm {
namespace {

// A reference with more than this share of the weight so far is taken by direct differences.
constexpr double kFusedHeavy = 1.0 / 32;
constexpr size_t kMostListed = 64;          // heavy references that wait to be taken
constexpr double kLogMassTolerance = 1e-6;  // four times the root mean square of the error

// What a task found for a query: the weights are relative to state.nearest.
struct Partial {
  OnlineState state;
  double light = 0, squares = 0;  // Σ w and at most Σ w² of the light references
  double unseen = 0;              // Σ w y·(x' − float(x')) of these
  int64_t anchor = 0;
  float nearest = INFINITY;  // smallest r
  bool certified = false;
};

// The state of one tile of queries over a piece of the references.
struct FusedTile {
  const FieldParams& p;
  const Operands& o;
  const RowReader& reader;
  const FusedQuery* queries;
  const int64_t* rows;
  int size;
  int64_t width, ld;
  double depth = cutoff_depth(p);
  LogitScale scale{p.half_k};
  double* totals;  // (d, width) Σ w y of the light references
  double* sums;    // (64, ld) Σ w (x0 − x) of the heavy ones

  float nearest[kTileQueries];                       // smallest r
  float shift[kTileQueries], inverse[kTileQueries];  // u = (r − shift) inverse
  float correction[kTileQueries], cutoff[kTileQueries];
  bool certified[kTileQueries];
  double level[kTileQueries];  // the squared distance that the weights are relative to
  double light[kTileQueries], taken[kTileQueries];  // weight in the totals, and listed
  double squares[kTileQueries];                     // Σ w² in the totals, at most
  double heavy[kTileQueries];                       // weight of what was listed, exactly
  double factor[kTileQueries];                      // takes totals to the new level
  int64_t anchor[kTileQueries];
  std::vector<int32_t> lists[kTileQueries];

  FusedTile(const FusedPass& pass, int64_t tile, double* totals, double* sums)
      : p(pass.p),
        o(pass.o),
        reader(pass.reader),
        queries(pass.queries.data() + tile * kTileQueries),
        rows(pass.tiles.rows.data() + tile * kTileQueries),
        size(pass.tiles.size(tile)),
        width(pass.tiles.width(tile)),
        ld(pass.ld),
        totals(totals),
        sums(sums) {
    for (int q = 0; q < width; ++q) {
      nearest[q] = q < size ? INFINITY : -INFINITY;
      certified[q] = q < size;
      level[q] = INFINITY;
      light[q] = squares[q] = taken[q] = heavy[q] = 0;
      factor[q] = 1;
      anchor[q] = 0;
      take_no_part(q);
    }
    std::fill_n(totals, p.dim * width, 0.0);
    std::fill_n(sums, size * ld, 0.0);
  }

  void take_no_part(int q) {
    shift[q] = inverse[q] = correction[q] = 0;
    cutoff[q] = INFINITY;
  }

  // Moves the queries to the smallest r of a block. Returns whether any query takes part.
  bool advance(const float* r, int64_t first, int64_t count) {
    for (int64_t v = 0; v < width; v += kFloatLanes) {
      const VecF least = smaller(smallest(r + v, width, count), load(nearest + v));
      std::fill_n(factor + v, kFloatLanes, 1.0);
      for (unsigned mask = below(least, load(nearest + v)); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask), q = static_cast<int>(v) + lane;
        int64_t j = 0;
        while (r[j * width + q] != least[lane]) ++j;
        anchor[q] = first + j;
        move(q, least[lane]);
      }
    }
    bool any = false;
    for (int q = 0; q < size; ++q) any |= certified[q];
    return any;
  }

  void move(int q, float r) {
    nearest[q] = r;
    if (!certified[q]) return;
    const FusedQuery& query = queries[q];
    const double square = o.unit * o.unit, to = (double{r} + query.offset) * square;
    const double s = to + query.kernel.offset;
    certified[q] = s >= query.least_s;
    if (!certified[q]) return take_no_part(q);
    if (level[q] < INFINITY) {
      factor[q] = query.kernel.relative_weight(level[q], to);
      light[q] *= factor[q];
      squares[q] *= factor[q] * factor[q];
      taken[q] *= factor[q];
      if (heavy[q] != 0) {
        heavy[q] *= factor[q];
        for (int64_t c = 0; c < ld; ++c) sums[q * ld + c] *= factor[q];
      }
    }
    level[q] = to;
    const double exact = scale.gaussian ? query.kernel.inverse_two_t2 * square : square / s;
    shift[q] = r;
    inverse[q] = static_cast<float>(exact);
    correction[q] = scale.correction(p.half_k, exact, inverse[q]);
    cutoff[q] = static_cast<float>(-depth);
  }

  // Weights of a block for kFloatLanes queries, summed up over runs of references.
  struct Runs {
    static constexpr int64_t kRows = 16;
    VecF sums[kFusedRows / kRows], most[kFusedRows / kRows];
    int64_t count;

    Vec total(int64_t lane) const {
      Vec sum = {};
      for (int64_t i = 0; i < count; ++i)
        sum += widen(reinterpret_cast<const float*>(sums + i) + lane);
      return sum;
    }

    VecF squares() const {  // at most
      VecF sum = {};
      for (int64_t i = 0; i < count; ++i) sum += sums[i] * most[i];
      return sum;
    }
  };

  // r of a block becomes weights, zero for those that are listed. Returns whether totals change.
  bool weigh(float* r, int64_t first, int64_t count) {
    bool any = false;
    for (int64_t v = 0; v < width; v += kFloatLanes) {
      Runs runs;
      runs.count = (count + Runs::kRows - 1) / Runs::kRows;
      for (int64_t i = 0; i < runs.count; ++i) {
        const int64_t start = i * Runs::kRows;
        weigh_run(r + start * width + v, std::min(count - start, Runs::kRows), v, runs.sums[i],
                  runs.most[i]);
      }
      any |= list_heavy(r + v, first, count, v, runs);
    }
    return any;
  }

  void weigh_run(float* r, int64_t count, int64_t v, VecF& sum, VecF& most) const {
    const VecF from = load(shift + v), by = load(inverse + v), low = load(correction + v);
    const VecF least = load(cutoff + v);
    sum = most = VecF{};
    int64_t j = 0;
    for (; j + kWeighRows <= count; j += kWeighRows) {
      weigh_rows<kWeighRows>(r + j * width, from, by, low, least, sum, most);
    }
    for (; j < count; ++j) weigh_rows<1>(r + j * width, from, by, low, least, sum, most);
  }

  // Several rows at a time: one alone is a long chain of operations that wait for one another.
  template <int kRows>
  void weigh_rows(float* r, VecF from, VecF by, VecF low, VecF least, VecF& sum, VecF& most) const {
    VecF u[kRows], weights[kRows];
    for (int i = 0; i < kRows; ++i) {
      u[i] = smaller((load(r + i * width) - from) * by, broadcast(kMostU));
    }
    for (int i = 0; i < kRows; ++i) u[i] = scale.logits(u[i], low);
    for (int i = 0; i < kRows; ++i) {
      weights[i] = u[i] >= least ? exp_normal(u[i]) : VecF{};
      store(r + i * width, weights[i]);
      most = larger(weights[i], most);
    }
    for (int n = kRows / 2; n > 0; n /= 2) {  // equal weights are summed without rounding
      for (int i = 0; i < n; ++i) weights[i] += weights[n + i];
    }
    sum += weights[0];
  }

  bool list_heavy(float* weights, int64_t first, int64_t count, int64_t v, Runs& runs) {
    const auto threshold = [&](int64_t lane) {
      return (load(light + v + lane) + load(taken + v + lane) + runs.total(lane)) * kFusedHeavy;
    };
    const VecF least = narrow(threshold(0), threshold(kLanes));
    for (int64_t i = 0; i < runs.count; ++i) {
      if (!below(least, runs.most[i])) continue;
      VecF sum = {}, most = {};
      for (int64_t j = i * Runs::kRows; j < std::min(count, (i + 1) * Runs::kRows); ++j) {
        VecF w = load(weights + j * width);
        if (const unsigned heavy = below(least, w)) {
          for (unsigned mask = heavy; mask; mask &= mask - 1) {
            const int lane = __builtin_ctz(mask);
            take(static_cast<int>(v) + lane, static_cast<int32_t>(first + j), w[lane]);
          }
          w = w > least ? VecF{} : w;
          store(weights + j * width, w);
        }
        sum += w;
        most = larger(w, most);
      }
      runs.sums[i] = sum;
      runs.most[i] = most;
    }
    bool changes = false;
    float more[kFloatLanes];
    store(more, runs.squares());
    for (int64_t lane = 0; lane < kFloatLanes; lane += kLanes) {
      const Vec total = runs.total(lane);
      store(light + v + lane, load(light + v + lane) + total);
      store(squares + v + lane, load(squares + v + lane) + widen(more + lane));
      changes |= bits(total != 0.0 || load(factor + v + lane) != 1.0) != 0;
    }
    return changes;
  }

  void take(int q, int32_t j, float weight) {
    taken[q] += weight;
    lists[q].push_back(j);
    if (lists[q].size() >= kMostListed) take_listed(q);
  }

  void take_listed(int q) {
    const double* x = p.x + rows[q] * ld;
    for (const int32_t j : lists[q]) {
      const double square = pair_sums(reader, x, nullptr, j).distance;
      const double weight = queries[q].kernel.relative_weight(square, level[q]);
      heavy[q] += weight;
      add_row(reader, x, j, weight, sums + q * ld);
    }
    lists[q].clear();
  }

  // Adds Σ w y of a block to the totals.
  void add(const float* out) {
    for (int64_t v = 0; v < width; v += kLanes) {
      const Vec by = load(factor + v);
      for (int64_t c = 0; c < p.dim; ++c) {
        double* total = totals + c * width + v;
        store(total, load(total) * by + widen(out + c * width + v));
      }
    }
  }

  void finish(int q, Partial& partial, double* displacement) {
    partial.nearest = nearest[q];
    partial.anchor = anchor[q];
    partial.certified = certified[q];
    if (!certified[q]) {
      lists[q].clear();
      return;
    }
    take_listed(q);
    const double* x = p.x + rows[q] * ld;
    for (int64_t c = 0; c < p.dim; ++c) {
      const double total = totals[c * width + q], shift = shifted(p, o, rows[q], c);
      displacement[c] = sums[q * ld + c] + (o.unit * total + light[q] * (o.origin[c] - x[c]));
      partial.unseen += total * (shift - static_cast<float>(shift));
    }
    for (int64_t c = p.dim; c < ld; ++c) displacement[c] = 0;
    partial.state.nearest = level[q];
    partial.state.sum = light[q] + heavy[q];
    partial.light = light[q];
    partial.squares = squares[q];
  }
};

struct FusedForward : FusedPass {
  uint8_t* uncertified;
  std::vector<Partial> partials{static_cast<size_t>(shares.size() * kTileQueries)};

  FusedForward(const FieldParams& p, const Operands& o, const Tiles& tiles, uint8_t* uncertified)
      : FusedPass(p, o, tiles), uncertified(uncertified) {}

  void run() {
    const Buffer<double> sums(p.num_threads * kTileQueries * ld);
    parallel_for(p.num_threads, shares.count(), [&](int64_t share, int thread) {
      double* heavy = sums.get() + thread * kTileQueries * ld;
      shares.for_pieces(share, [&](int64_t n) { run_piece(n, areas[thread], heavy); });
    });
    std::vector<int64_t> rest;
    for (int64_t i = 0; i < size; ++i) {
      if (!combine(i)) rest.push_back(i);
    }
    finish_sparse(
        rest, uncertified, nullptr, [&](int64_t i) { return limit(i); }, finish_sparse_forward);
  }

  void run_piece(int64_t n, FusedArea& area, double* sums) {
    const Piece& piece = shares.pieces[n];
    const int64_t start = piece.tile * kTileQueries;
    FusedTile state(*this, piece.tile, area.totals.get(), sums);
    for_blocks(tiles, piece, area, [&](FusedBlock& block, float* r, int64_t first) {
      if (!state.advance(r, first, block.rows) || !state.weigh(r, first, block.rows)) return;
      block.gather(r, state.width, area.out.get());
      state.add(area.out.get());
    });
    for (int q = 0; q < state.size; ++q) {
      state.finish(q, partials[place(n, q)], row(n, start + q, p.displacement));
    }
  }

  // Combines what the pieces found for a query; false where it is not precise enough.
  bool combine(int64_t i) {
    const auto [piece, end] = pieces_of(i);
    Partial& all = partials[place(piece, i)];
    const RadialKernel& kernel = queries[i].kernel;
    double* v = row(piece, i, p.displacement);
    for (int64_t n = piece + 1; n < end; ++n) {
      const Partial& other = partials[place(n, i)];
      all.certified &= other.certified;
      if (other.nearest < all.nearest) {
        all.nearest = other.nearest;
        all.anchor = other.anchor;
      }
      if (!all.certified) continue;
      const auto [own, theirs] = all.state.merge(other.state, kernel);
      all.light = own * all.light + theirs * other.light;
      all.unseen = own * all.unseen + theirs * other.unseen;
      all.squares = own * own * all.squares + theirs * theirs * other.squares;
      const double* more = row(n, i, p.displacement);
      for (int64_t c = 0; c < p.dim; ++c) v[c] = own * v[c] + theirs * more[c];
    }
    if (!all.certified) return false;
    const int64_t b = tiles.rows[i];
    const double sum = all.state.sum;
    for (int64_t c = 0; c < p.dim; ++c) v[c] /= sum;
    const double square = pair_sums(reader, p.x + b * ld, nullptr, all.anchor).distance;
    if (!resolves(p, o, v, ::sqrt(square)) || !precise(i, all, square)) return false;
    p.anchor[b] = all.anchor;
    p.log_mass[b] = kernel.logit(all.state.nearest) + ::log(sum);
    p.anchor_log_weight[b] =
        kernel.relative_logit<ScalarMath>(square, all.state.nearest) - ::log(sum);
    return std::isfinite(p.log_mass[b]);
  }

  // Whether the logits of the light references, whose errors are independent but for those of
  // copies and what float leaves out of the query, are precise enough.
  bool precise(int64_t i, const Partial& all, double anchor_square) const {
    const int64_t b = tiles.rows[i];
    const double* v = p.displacement + b * ld;
    double product = 0;
    for (int64_t c = 0; c < p.dim; ++c) {
      const double x = shifted(p, o, b, c);
      product += x * (x + v[c] * o.inverse_unit);
    }
    const double slope = queries[i].kernel.slope(anchor_square) * o.unit * o.unit;
    const double squares = std::min(all.squares * o.copies, all.light * all.light);
    const double apart = rounding(i, product) * ::sqrt(squares);
    // In the mean, what float leaves out is known; of what is about the mean it is not.
    const double about = queries[i].bound.residual * o.radius * all.light;
    const double alike = 2 * (std::abs(all.unseen) + about / ::sqrt(static_cast<double>(p.dim)));
    return slope * (4 * apart + alike) <= kLogMassTolerance * all.state.sum;
  }

  // Largest r that a reference of any weight can have.
  float limit(int64_t i) const {
    const FusedQuery& query = queries[i];
    const double smallest = double{partials[place(pieces_of(i).first, i)].nearest} + centre;
    const double most = cutoff(p, o, tiles.rows[i], query.bound.offset, smallest + query.error) +
                        query.error - centre;
    return std::nextafter(static_cast<float>(most), INFINITY);
  }
};

}  // namespace

void PFGM_ISA::fused_forward(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    uncertified[b] = operands.alike || !in_range(p, operands, b);
    if (!uncertified[b]) tiles.rows.push_back(b);
  }
  if (!tiles.rows.empty()) FusedForward(p, operands, tiles, uncertified).run();
}

}  // namespace pfgm
