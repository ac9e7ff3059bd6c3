// SPDX-License-Identifier: Apache-2.0
// The exact finish: one query and a list of references, by direct differences in double.
#pragma once

#include <vector>

#include "pull.h"
#include "queries.h"

namespace pfgm {
namespace {

// How references are read as doubles. kAffine: every code stands for float(low + step · code),
// which is computed faster than it is looked up.
enum class Source { kFloats, kTable, kAffine };

struct RowReader {
  const FieldParams& p;
  Source source = Source::kFloats;
  double low = 0, step = 0;

  explicit RowReader(const FieldParams& p) : p(p) {
    if (p.value_type != ValueType::kUint8) return;
    low = p.table[0];
    step = (double{p.table[255]} - low) / 255;
    bool affine = true;
    for (int u = 0; u < 256; ++u) affine &= static_cast<float>(low + step * u) == p.table[u];
    source = affine ? Source::kAffine : Source::kTable;
  }

  int64_t row_bytes() const { return p.dim * (source == Source::kFloats ? 4 : 1); }
  const char* row(int64_t j) const { return static_cast<const char*>(p.values) + j * row_bytes(); }
};

// One reference; passed by value, so that a loop that stores doubles need not read it again.
template <Source kSource>
struct Row {
  const char* values;
  const float* table;
  double low, step;

  Row(const RowReader& reader, int64_t j)
      : values(reader.row(j)), table(reader.p.table), low(reader.low), step(reader.step) {}

  Vec read(int64_t c) const {
    if constexpr (kSource == Source::kFloats) {
      return widen(reinterpret_cast<const float*>(values) + c);
    } else if constexpr (kSource == Source::kAffine) {
      return round_to_float(low + step * widen(reinterpret_cast<const uint8_t*>(values) + c));
    } else {
      Vec v = {};
      for (int i = 0; i < kLanes; ++i) v[i] = read_one(c + i);
      return v;
    }
  }

  double read_one(int64_t c) const {
    if constexpr (kSource == Source::kFloats) {
      return reinterpret_cast<const float*>(values)[c];
    } else {
      return table[reinterpret_cast<const uint8_t*>(values)[c]];
    }
  }
};

// ‖x − x0_j‖² and g·(x0_j − x), the latter only where g is not null.
struct Pair {
  double distance = 0, projection = 0;
};

template <bool kProject, Source kSource>
inline Pair pair_sums(const Row<kSource> row, int64_t dim, const double* x, const double* g) {
  constexpr int kChains = 4;  // sums in flight
  Vec distances[kChains] = {}, projections[kChains] = {};
  const auto add = [&](int64_t c, int chain) {
    const Vec difference = row.read(c) - load(x + c);
    distances[chain] += difference * difference;
    if constexpr (kProject) projections[chain] += load(g + c) * difference;
  };
  int64_t c = 0;
  for (; c + kChains * kLanes <= dim; c += kChains * kLanes) {
    for (int i = 0; i < kChains; ++i) add(c + i * kLanes, i);
  }
  for (; c + kLanes <= dim; c += kLanes) add(c, 0);
  Pair pair;
  for (; c < dim; ++c) {
    const double difference = row.read_one(c) - x[c];
    pair.distance += difference * difference;
    if constexpr (kProject) pair.projection += g[c] * difference;
  }
  pair.distance += reduce_add((distances[0] + distances[1]) + (distances[2] + distances[3]));
  if constexpr (kProject) {
    pair.projection +=
        reduce_add((projections[0] + projections[1]) + (projections[2] + projections[3]));
  }
  return pair;
}

// sums[c] += weight (x0_j[c] − x[c])
template <Source kSource>
inline void add_row(const Row<kSource> row, int64_t dim, const double* x, double weight,
                    double* sums) {
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    store(sums + c, load(sums + c) + weight * (row.read(c) - load(x + c)));
  }
  for (; c < dim; ++c) sums[c] += weight * (row.read_one(c) - x[c]);
}

// task(row of reference j)
template <class Task>
inline auto with_row(const RowReader& reader, int64_t j, const Task& task) {
  switch (reader.source) {
    case Source::kFloats:
      return task(Row<Source::kFloats>(reader, j));
    case Source::kTable:
      return task(Row<Source::kTable>(reader, j));
    default:
      return task(Row<Source::kAffine>(reader, j));
  }
}

inline Pair pair_sums(const RowReader& reader, const double* x, const double* g, int64_t j) {
  const int64_t dim = reader.p.dim;
  return with_row(reader, j, [&](const auto& row) {
    return g ? pair_sums<true>(row, dim, x, g) : pair_sums<false>(row, dim, x, g);
  });
}

inline void add_row(const RowReader& reader, const double* x, int64_t j, double weight,
                    double* sums) {
  with_row(reader, j, [&](const auto& row) { add_row(row, reader.p.dim, x, weight, sums); });
}

// A query and the references that may carry weight for it.
struct SparseQuery {
  int64_t b;
  const std::vector<int32_t>* list;
  std::vector<Pair> pairs;  // of the listed references
};

// The sums of pairs first to last of a query's list. g (B, ld) or null.
inline void compute_pairs(const RowReader& reader, const double* g, SparseQuery& query,
                          int64_t first, int64_t last) {
  const int64_t start = query.b * round_up(reader.p.dim, kPad);
  for (int64_t i = first; i < last; ++i) {
    query.pairs[i] =
        pair_sums(reader, reader.p.x + start, g ? g + start : nullptr, (*query.list)[i]);
  }
}

// Displacement and log mass over the listed references (Eqs. 3 and 12).
inline void finish_sparse_forward(const FieldParams& p, const RowReader& reader,
                                  const SparseQuery& query) {
  const int64_t b = query.b, ld = round_up(p.dim, kPad);
  const RadialKernel kernel(p.half_k, p.t[b]);
  const double* x = p.x + b * ld;
  double nearest = INFINITY, sum = 0;
  for (size_t n = 0; n < query.pairs.size(); ++n) {
    if (query.pairs[n].distance < nearest) {
      nearest = query.pairs[n].distance;
      p.anchor[b] = (*query.list)[n];
    }
  }
  double* displacement = p.displacement + b * ld;
  std::fill(displacement, displacement + ld, 0.0);
  const double negligible = ::exp(-cutoff_depth(p));
  for (size_t n = 0; n < query.pairs.size(); ++n) {
    const double weight = kernel.relative_weight(query.pairs[n].distance, nearest);
    if (weight < negligible) continue;
    sum += weight;
    add_row(reader, x, (*query.list)[n], weight, displacement);
  }
  for (int64_t c = 0; c < ld; ++c) displacement[c] /= sum;
  p.log_mass[b] = kernel.logit(nearest) + ::log(sum);
  p.anchor_log_weight[b] = -::log(sum);
}

// c_j of a reference (exact/backward.cpp).
inline double pair_coefficient(const FieldParams& p, int64_t b, const RadialKernel& kernel,
                               const TotalPull& total, const Pair& pair) {
  const double logit = kernel.relative_logit<ScalarMath>(pair.distance, p.anchor_square[b]);
  const double weight = ::exp(std::min(0.0, logit + p.anchor_log_weight[b]));
  if (weight == 0) return 0;
  const double u = kernel.argument(pair.distance, p.anchor_square[b]);
  const double a = pair.projection - p.projection[b] + p.grad_log_mass[b] - total.tilt * u;
  return weight * a * kernel.slope(pair.distance);
}

// Gradients for x and t over the listed references (exact/backward.cpp).
inline void finish_sparse_backward(const FieldParams& p, const RowReader& reader,
                                   const SparseQuery& query) {
  const int64_t b = query.b, ld = round_up(p.dim, kPad);
  const RadialKernel kernel(p.half_k, p.t[b]);
  const double* x = p.x + b * ld;
  double* dx = p.dx ? p.dx + b * ld : nullptr;
  if (dx) std::fill(dx, dx + ld, 0.0);
  const TotalPull total(p, b);
  double sum = 0;
  for (size_t n = 0; n < query.pairs.size(); ++n) {
    const Pair& pair = query.pairs[n];
    const double c = pair_coefficient(p, b, kernel, total, pair);
    if (c == 0) continue;
    sum += total.moment ? c * pair.distance : c;
    if (dx) add_row(reader, x, (*query.list)[n], 2 * c, dx);
  }
  p.dt[b] = sum * total.factor;
}

// Calls finish(query) for all queries once their pairs are known, with g (B, ld) or null. The pairs
// are shared out evenly: some lists are long.
template <class Finish>
void finish_all(const RowReader& reader, const double* g, std::vector<SparseQuery>& queries,
                const Finish& finish) {
  constexpr int64_t kPairs = 32;                   // of a task
  std::vector<std::pair<int64_t, int64_t>> tasks;  // query, first of its list
  for (size_t i = 0; i < queries.size(); ++i) {
    const int64_t size = static_cast<int64_t>(queries[i].list->size());
    queries[i].pairs.resize(size);
    for (int64_t first = 0; first < size; first += kPairs) {
      tasks.emplace_back(static_cast<int64_t>(i), first);
    }
  }
  parallel_for(reader.p.num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t task, int) {
    SparseQuery& query = queries[tasks[task].first];
    const int64_t first = tasks[task].second, size = static_cast<int64_t>(query.pairs.size());
    compute_pairs(reader, g, query, first, std::min(size, first + kPairs));
  });
  parallel_for(reader.p.num_threads, static_cast<int64_t>(queries.size()),
               [&](int64_t i, int) { finish(queries[i]); });
}

}  // namespace
}  // namespace pfgm
