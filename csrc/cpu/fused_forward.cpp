// SPDX-License-Identifier: Apache-2.0
// Displacement and log mass, Eqs. (3) and (12), for 32 < d ≤ 256 and float32 queries, in one pass
// with an online state (fused.h). Weights are relative to the smallest r so far,
//
//   w_j = exp(−(k/2) log1p((r_j − r_min)/s_min)),   s_min = unit² (r_min + offset)
//
// where s_min need not be the s of any reference exactly: it is what all logits refer to.
// References that hold much of the weight are left out of the products and taken by direct
// differences.
#include "fused.h"

namespace pfgm {
namespace {

// A reference with more than this share of the weight so far is taken by direct differences.
constexpr double kFusedHeavy = 1.0 / 32;
constexpr int kWeighRows = 4;
constexpr size_t kMostListed = 64;  // heavy references that wait to be taken
// Logits may be off by this much if all roundings of a product added up.
constexpr double kFusedTolerance = 4e-5;
// And displacements of light references by this much, relative to the distance.
constexpr double kFusedDisplacement = 4e-7;
constexpr double kLeastS = 1e-30;  // of which a float holds the reciprocal
// Candidates up to which an uncertified query is finished by direct differences.
constexpr int64_t kFusedFew = 64, kFusedShare = 16;

// A query, in units of the operands where nothing else is said.
struct FusedQuery {
  RadialKernel kernel;
  Bound bound;
  double offset;   // s / unit² − r
  double error;    // of r at most
  double least_s;  // s of the nearest below which the weights are not precise enough
};

// What a task found for a query: the weights are relative to state.nearest, an s.
struct Partial {
  OnlineState state;
  int64_t anchor = 0;
  float nearest = INFINITY;  // smallest r
  bool certified = false;
};

// Work area of a thread.
struct Area {
  Buffer<float> y, packed, r, out;
  Buffer<double> totals, sums;
  explicit Area(int64_t dim)
      : y(FusedBlock::size(dim)),
        packed((dim + 1) * kTileQueries),
        r(kFusedRows * kTileQueries),
        out(dim * kTileQueries),
        totals(dim * kTileQueries),
        sums(round_up(dim, kPad) * kTileQueries) {}
};

// The state of one tile of queries over one part of the references.
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
  double level[kTileQueries];                       // s that the weights are relative to
  double light[kTileQueries], taken[kTileQueries];  // weight in the totals, and listed
  double heavy[kTileQueries];                       // weight of what was listed, exactly
  double factor[kTileQueries];                      // takes totals to the new level
  int64_t anchor[kTileQueries];
  std::vector<int32_t> lists[kTileQueries];

  FusedTile(const FieldParams& p, const Operands& o, const RowReader& reader,
            const FusedQuery* queries, const Tiles& tiles, int64_t tile, Area& area)
      : p(p),
        o(o),
        reader(reader),
        queries(queries),
        rows(tiles.rows.data() + tile * kTileQueries),
        size(tiles.size(tile)),
        width(tiles.width(tile)),
        ld(round_up(p.dim, kPad)),
        totals(area.totals.get()),
        sums(area.sums.get()) {
    for (int q = 0; q < width; ++q) {
      nearest[q] = q < size ? INFINITY : -INFINITY;
      certified[q] = q < size;
      level[q] = light[q] = taken[q] = heavy[q] = 0;
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
      VecF least = load(nearest + v);
      for (int64_t j = 0; j < count; ++j) {
        const VecF value = load(r + j * width + v);
        least = value < least ? value : least;
      }
      float lanes[kFloatLanes];
      store(lanes, least);
      for (int i = 0; i < kFloatLanes; ++i) {
        const int64_t q = v + i;
        factor[q] = 1;
        if (!(lanes[i] < nearest[q])) continue;
        int64_t j = 0;
        while (r[j * width + q] != lanes[i]) ++j;
        anchor[q] = first + j;
        move(static_cast<int>(q), lanes[i]);
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
    const double square = o.unit * o.unit, s = (double{r} + query.offset) * square;
    certified[q] = s >= query.least_s;
    if (!certified[q]) return take_no_part(q);
    if (level[q] > 0) {
      factor[q] = query.kernel.relative_weight(level[q], s);
      light[q] *= factor[q];
      taken[q] *= factor[q];
      if (heavy[q] != 0) {
        heavy[q] *= factor[q];
        for (int64_t c = 0; c < ld; ++c) sums[q * ld + c] *= factor[q];
      }
    }
    level[q] = s;
    const double exact = scale.gaussian ? query.kernel.inverse_two_t2 * square : square / s;
    shift[q] = r;
    inverse[q] = static_cast<float>(exact);
    correction[q] = scale.correction(p.half_k, exact, inverse[q]);
    cutoff[q] = static_cast<float>(-depth);
  }

  // r of a block becomes weights, zero for those that are listed. Returns whether totals change.
  bool weigh(float* r, int64_t first, int64_t count) {
    bool any = false;
    for (int64_t v = 0; v < width; v += kFloatLanes) {
      const VecF from = load(shift + v), by = load(inverse + v), low = load(correction + v);
      const VecF least = load(cutoff + v);
      VecF sum = {}, most = {};
      int64_t j = 0;
      for (; j + kWeighRows <= count; j += kWeighRows) {
        weigh_rows<kWeighRows>(r + j * width + v, from, by, low, least, sum, most);
      }
      for (; j < count; ++j) weigh_rows<1>(r + j * width + v, from, by, low, least, sum, most);
      any |= list_heavy(r + v, first, count, static_cast<int>(v), sum, most);
    }
    return any;
  }

  // Several rows at a time: one alone is a long chain of operations that wait for one another.
  template <int kRows>
  void weigh_rows(float* r, VecF from, VecF by, VecF low, VecF least, VecF& sum, VecF& most) const {
    VecF u[kRows], weights[kRows];
    for (int i = 0; i < kRows; ++i) {
      u[i] = (load(r + i * width) - from) * by;
      u[i] = u[i] < kMostU ? u[i] : broadcast(kMostU);
    }
    for (int i = 0; i < kRows; ++i) u[i] = scale.logits(u[i], low);
    for (int i = 0; i < kRows; ++i) weights[i] = u[i] >= least ? plain_exp(u[i]) : VecF{};
    for (int i = 0; i < kRows; ++i) {
      store(r + i * width, weights[i]);
      sum += weights[i];
      most = weights[i] > most ? weights[i] : most;
    }
  }

  bool list_heavy(float* weights, int64_t first, int64_t count, int v, VecF sum, VecF most) {
    float sums_[kFloatLanes], threshold[kFloatLanes];
    store(sums_, sum);
    for (int i = 0; i < kFloatLanes; ++i) {
      const double total = light[v + i] + taken[v + i] + sums_[i];
      threshold[i] = static_cast<float>(kFusedHeavy * total);
    }
    if (float_bits(most > load(threshold))) {
      sum = VecF{};
      for (int64_t j = 0; j < count; ++j) {
        const VecF w = load(weights + j * width);
        unsigned mask = float_bits(w > load(threshold));
        if (mask) {
          store(weights + j * width, w > load(threshold) ? VecF{} : w);
          for (; mask; mask &= mask - 1) {
            const int i = __builtin_ctz(mask);
            take(v + i, static_cast<int32_t>(first + j), w[i]);
          }
        }
        sum += load(weights + j * width);
      }
      store(sums_, sum);
    }
    bool any = false;
    for (int i = 0; i < kFloatLanes; ++i) {
      light[v + i] += sums_[i];
      any |= sums_[i] != 0 || factor[v + i] != 1;
    }
    return any;
  }

  void take(int q, int32_t j, float weight) {
    taken[q] += weight;
    lists[q].push_back(j);
    if (lists[q].size() >= kMostListed) take_listed(q);
  }

  void take_listed(int q) {
    const double* x = p.x + rows[q] * ld;
    const double offset = queries[q].kernel.s_offset(p.t[rows[q]]);
    for (const int32_t j : lists[q]) {
      const double s = pair_sums(reader, x, nullptr, j).distance + offset;
      const double weight = queries[q].kernel.relative_weight(s, level[q]);
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
      displacement[c] =
          sums[q * ld + c] + (o.unit * totals[c * width + q] + light[q] * (o.origin[c] - x[c]));
    }
    for (int64_t c = p.dim; c < ld; ++c) displacement[c] = 0;
    partial.state.nearest = level[q];
    partial.state.sum = light[q] + heavy[q];
    const double t2 = queries[q].kernel.s_offset(p.t[rows[q]]);
    const double distance = ::sqrt(std::max(0.0, level[q] - t2));
    const double lost = kFloatRounding * o.unit * o.radius * light[q];
    partial.certified = lost <= kFusedDisplacement * distance * partial.state.sum;
  }
};

struct FusedForward {
  const FieldParams& p;
  const Operands& o;
  const Tiles& tiles;
  uint8_t* uncertified;
  RowReader reader{p};
  int64_t ld = round_up(p.dim, kPad);
  int64_t size = static_cast<int64_t>(tiles.rows.size());
  double centre = norm_centre(p, o);
  Parts parts{p, tiles.count()};
  std::vector<float> origin{o.origin, o.origin + p.dim};
  std::vector<FusedQuery> queries{static_cast<size_t>(size)};
  std::vector<Partial> partials{static_cast<size_t>(size * parts.count)};
  Buffer<double> others{(parts.count - 1) * size * ld};  // displacements of all parts but the first

  double* displacement(int64_t part, int64_t i) const {
    return part == 0 ? p.displacement + tiles.rows[i] * ld
                     : others.get() + ((part - 1) * size + i) * ld;
  }

  void run() {
    double spread = 0;  // of the norms
    for (int64_t j = 0; j < p.count; ++j) spread = std::max(spread, std::abs(o.norms[j] - centre));
    std::vector<Area> areas;
    for (int i = 0; i < p.num_threads; ++i) areas.emplace_back(p.dim);
    parallel_for(p.num_threads, tiles.count(), [&](int64_t tile, int thread) {
      prepare(tile, spread, areas[thread].packed.get());
    });
    parallel_for(p.num_threads, tiles.count() * parts.count, [&](int64_t task, int thread) {
      run_task(task / parts.count, task % parts.count, areas[thread]);
    });
    Tiles rest;
    std::vector<int64_t> index;
    for (int64_t i = 0; i < size; ++i) {
      if (combine(i)) continue;
      index.push_back(i);
      rest.rows.push_back(tiles.rows[i]);
    }
    if (!index.empty()) finish_sparse(rest, index, areas);
  }

  void prepare(int64_t tile, double spread, float* packed) {
    double residuals[kTileQueries];
    pack_queries(p, o, tiles, tile, packed, residuals);
    for (int q = 0; q < tiles.size(tile); ++q) {
      const int64_t b = tiles.row(tile, q);
      const QueryNorms norms = query_norms(p, o, b);
      FusedQuery& query = queries[tile * kTileQueries + q];
      query.kernel = RadialKernel(p.half_k, p.t[b]);
      query.bound = make_bound(p, o, b, norms, 2, residuals[q] / 2, static_cast<double>(p.dim) + 2);
      query.offset = query.bound.offset + centre;
      query.error =
          query.bound.slope * o.radius + query.bound.constant + 2 * kFloatRounding * spread;
      const double slope = query.kernel.gaussian ? query.kernel.inverse_two_t2 : p.half_k;
      const double error =
          2 * (kFloatRounding * ::sqrt(norms.squared) + residuals[q] / 2) * o.radius +
          kFloatRounding * spread;
      const double least = slope * error * o.unit * o.unit / kFusedTolerance;
      query.least_s = !query.kernel.gaussian       ? std::max(kLeastS, least)
                      : least <= 1 && slope < 1e30 ? -INFINITY
                                                   : INFINITY;
    }
  }

  void run_task(int64_t tile, int64_t part, Area& area) {
    const int64_t width = tiles.width(tile), start = tile * kTileQueries;
    double residuals[kTileQueries];
    pack_queries(p, o, tiles, tile, area.packed.get(), residuals);
    FusedTile state(p, o, reader, queries.data() + start, tiles, tile, area);
    FusedBlock block{area.y.get(), origin.data(), p.dim};
    const int64_t last = std::min(p.count, (part + 1) * parts.rows);
    for (int64_t first = part * parts.rows; first < last; first += kFusedRows) {
      const int64_t count = std::min(last - first, kFusedRows);
      block.load(p, o, centre, first, count);
      float* r = area.r.get();
      block.multiply(area.packed.get(), p.dim + 1, width, r);
      if (!state.advance(r, first, count) || !state.weigh(r, first, count)) continue;
      block.gather(r, width, area.out.get());
      state.add(area.out.get());
    }
    for (int q = 0; q < state.size; ++q) {
      state.finish(q, partials[part * size + start + q], displacement(part, start + q));
    }
  }

  // Combines what the parts found for a query; false where it is not precise enough.
  bool combine(int64_t i) {
    Partial& all = partials[i];
    const RadialKernel& kernel = queries[i].kernel;
    double* v = displacement(0, i);
    for (int64_t part = 1; part < parts.count; ++part) {
      const Partial& other = partials[part * size + i];
      all.certified &= other.certified;
      if (other.nearest < all.nearest) {
        all.nearest = other.nearest;
        all.anchor = other.anchor;
      }
      if (!all.certified) continue;
      const OnlineState::Factors factors = all.state.merge(other.state, kernel);
      const double* theirs = displacement(part, i);
      for (int64_t c = 0; c < p.dim; ++c) v[c] = factors.own * v[c] + factors.theirs * theirs[c];
    }
    if (!all.certified) return false;
    const int64_t b = tiles.rows[i];
    const double sum = all.state.sum, offset = kernel.s_offset(p.t[b]);
    for (int64_t c = 0; c < p.dim; ++c) v[c] /= sum;
    const double s = pair_sums(reader, p.x + b * ld, nullptr, all.anchor).distance + offset;
    p.anchor[b] = all.anchor;
    p.log_mass[b] = kernel.logit(all.state.nearest) + ::log(sum);
    p.anchor_log_weight[b] = kernel.relative_logit<ScalarMath>(s, all.state.nearest) - ::log(sum);
    return std::isfinite(p.log_mass[b]);
  }

  // Queries whose weights are not precise enough, but that few references can carry weight for.
  // rest: their rows; index: where they are among the queries.
  void finish_sparse(const Tiles& rest, const std::vector<int64_t>& index,
                     std::vector<Area>& areas) {
    const size_t few = static_cast<size_t>(std::max(kFusedFew, p.count / kFusedShare));
    parallel_for(p.num_threads, rest.count(), [&](int64_t tile, int thread) {
      float limits[kTileQueries];
      std::fill_n(limits, kTileQueries, -INFINITY);
      for (int q = 0; q < rest.size(tile); ++q) limits[q] = limit(index[tile * kTileQueries + q]);
      std::vector<int32_t> lists[kTileQueries];
      list_candidates(rest, tile, few, limits, lists, areas[thread]);
      for (int q = 0; q < rest.size(tile); ++q) {
        const int64_t b = rest.row(tile, q);
        uncertified[b] = lists[q].size() > few || lists[q].empty();
        if (uncertified[b]) continue;
        const int64_t size = static_cast<int64_t>(lists[q].size());
        SparseQuery query{b, &lists[q], std::vector<Pair>(size)};
        compute_pairs(reader, nullptr, query, 0, size);
        finish_sparse_forward(p, reader, query);
      }
    });
  }

  // Largest r that a reference of any weight can have.
  float limit(int64_t i) const {
    const FusedQuery& query = queries[i];
    const double smallest = double{partials[i].nearest} + centre;
    const double most = cutoff(query.bound, smallest + query.error) + query.error - centre;
    return std::nextafter(static_cast<float>(most), INFINITY);
  }

  void list_candidates(const Tiles& rest, int64_t tile, size_t few, float* limits,
                       std::vector<int32_t>* lists, Area& area) {
    const int64_t width = rest.width(tile);
    double residuals[kTileQueries];
    pack_queries(p, o, rest, tile, area.packed.get(), residuals);
    FusedBlock block{area.y.get(), origin.data(), p.dim};
    for (int64_t first = 0; first < p.count; first += kFusedRows) {
      const int64_t count = std::min(p.count - first, kFusedRows);
      block.load(p, o, centre, first, count);
      block.multiply(area.packed.get(), p.dim + 1, width, area.r.get());
      for (int64_t v = 0; v < width; v += kFloatLanes) {
        for (int64_t j = 0; j < count; ++j) {
          const VecF r = load(area.r.get() + j * width + v);
          for (unsigned mask = float_bits(r <= load(limits + v)); mask; mask &= mask - 1) {
            const int64_t q = v + __builtin_ctz(mask);
            lists[q].push_back(static_cast<int32_t>(first + j));
            if (lists[q].size() > few) limits[q] = -INFINITY;
          }
        }
      }
    }
  }
};

}  // namespace

void PFGM_ISA::fused_forward(const FieldParams& p, uint8_t* uncertified) {
  const Operands operands = make_operands(p);
  Tiles tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    const QueryNorms norms = query_norms(p, operands, b);
    // Also false for NaN: what is not finite, here or in a reference, goes to the exact kernel.
    const bool usable = norms.squared + norms.t_squared < 1e30 && operands.radius < 1e15;
    uncertified[b] = !usable;
    if (usable) tiles.rows.push_back(b);
  }
  if (!tiles.rows.empty()) FusedForward{p, operands, tiles, uncertified}.run();
}

}  // namespace pfgm
