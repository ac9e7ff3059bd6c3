// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernels through their entry points and checks what they give; tests/cpu/sanitize.py
// builds it with the sanitizers:
//
//   cpu_kernels INSTRUCTION_SET...
#include <algorithm>
#include <cstdio>
#include <functional>
#include <stdexcept>

#include "cpu_rows.h"
#include "cpu_truth.h"

namespace {

using pfgm::FieldParams;
using pfgm::ValueType;

int failures = 0;

void expect(bool good, const std::string& name, const char* what, double error = NAN,
            double allowed = NAN) {
  if (good || ++failures > 40) return;
  std::printf("WRONG %s: %s: %s (error %.3g, allowed %.3g)\n", pfgm::instruction_set(),
              name.c_str(), what, error, allowed);
}

struct Outputs {
  Array<double> displacement, log_mass, anchor_log_weight, dx, dt;
  Array<double> pull, slope;  // forward mode
  Array<int64_t> anchor;
  Array<float> dfloats;
  Array<double> ddoubles;

  explicit Outputs(const Problem& p)
      : displacement(p.batch * p.ld(), p.skewed),
        log_mass(p.batch, p.skewed),
        anchor_log_weight(p.batch, p.skewed),
        dx(p.batch * p.ld(), p.skewed),
        dt(p.batch, p.skewed),
        pull(p.batch * p.ld(), p.skewed),
        slope(p.batch, p.skewed),
        anchor(p.batch, p.skewed),
        dfloats(p.floats.size(), p.skewed),
        ddoubles(p.doubles.size(), p.skewed) {}

  double dx0(int64_t i) const { return dfloats.size() > 0 ? dfloats[i] : ddoubles[i]; }

  bool same_bits(const Outputs& o) const {
    return displacement.same_bits(o.displacement) && log_mass.same_bits(o.log_mass) &&
           anchor_log_weight.same_bits(o.anchor_log_weight) && dx.same_bits(o.dx) &&
           dt.same_bits(o.dt) && pull.same_bits(o.pull) && slope.same_bits(o.slope) &&
           anchor.same_bits(o.anchor) && dfloats.same_bits(o.dfloats) &&
           ddoubles.same_bits(o.ddoubles);
  }
};

FieldParams inputs(const Problem& p) {
  FieldParams params{};
  params.batch = p.batch;
  params.count = p.count;
  params.dim = p.dim;
  params.half_k = (p.dim + p.D) / 2;
  params.x = p.x.get();
  params.t = p.t.get();
  params.values = p.values();
  params.table = p.table.get();
  params.value_type = p.type;
  params.single = p.single;
  params.num_threads = p.num_threads;
  return params;
}

// Forward mode, x moving by g and t by g_m. Tangents of logits are relative to the anchor's.
void push(const Problem& p, FieldParams params, const Outputs& outputs) {
  Array<double> projection(p.batch, p.skewed), zeros(p.batch, p.skewed), tilt(p.batch, p.skewed);
  for (int64_t b = 0; b < p.batch; ++b) {
    zeros[b] = projection[b] = 0;
    const double *g = p.g.get() + b * p.ld(), *x = p.x.get() + b * p.ld();
    for (int64_t c = 0; c < p.dim; ++c)
      projection[b] += g[c] * (p.value(outputs.anchor[b], c) - x[c]);
    const double stretch = p.t[b] * p.g_m[b];
    tilt[b] = std::isinf(p.D) ? -2 * stretch : projection[b] - stretch;
  }
  params.projection = projection.get();
  params.grad_log_mass = zeros.get();
  params.tilt = tilt.get();
  params.dt = outputs.slope.get();
  for (double* dx : {outputs.pull.get(), static_cast<double*>(nullptr)}) {
    params.dx = dx;
    pfgm::field_backward_queries_cpu(params);
  }
}

// All kernels, called as pfgm_kernels/backends/cpu.py does.
Outputs compute(const Problem& p) {
  Outputs outputs(p);
  FieldParams forward = inputs(p), backward = inputs(p);
  forward.displacement = outputs.displacement.get();
  forward.anchor = outputs.anchor.get();
  forward.log_mass = outputs.log_mass.get();
  forward.anchor_log_weight = outputs.anchor_log_weight.get();
  const bool prepare = p.type != ValueType::kFloat64;
  Array<double> norms(prepare ? p.count : 0, p.skewed);
  Array<double> grid(prepare ? 4 + p.dim : 0, p.skewed);
  Array<uint8_t> codes(p.encode ? p.floats.size() : 0, p.skewed);
  for (FieldParams* params : {&forward, &backward}) {
    params->norms = norms.get();
    params->grid = grid.get();
    params->codes = p.encode ? codes.get() : nullptr;
  }
  if (prepare) pfgm::prepare_references_cpu(forward);
  if (p.encode && grid[1] < 0) forward.codes = backward.codes = nullptr;
  pfgm::field_forward_cpu(forward);

  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t a = outputs.anchor[b];
    if (a < 0 || a >= p.count) throw std::runtime_error(p.name() + ": there is no such anchor");
  }
  Begun begun(p);
  begun.compute<float>(p, forward, pfgm::Output::kField);  // for what it reads and writes
  begun.compute<double>(p, forward, pfgm::Output::kMean);
  begun.compute<double>(p, forward, pfgm::Output::kDisplacement);
  backward.anchor_log_weight = outputs.anchor_log_weight.get();
  backward.anchor_square = begun.anchor_square.get();
  backward.grad_displacement = begun.g.get();
  backward.projection = begun.projection.get();
  backward.grad_log_mass = begun.g_m.get();
  backward.dx = outputs.dx.get();
  backward.dt = outputs.dt.get();
  pfgm::field_backward_queries_cpu(backward);
  push(p, backward, outputs);
  if (p.type == ValueType::kUint8) return outputs;
  backward.dx = backward.dt = nullptr;
  backward.dvalues = p.type == ValueType::kFloat32 ? static_cast<void*>(outputs.dfloats.get())
                                                   : static_cast<void*>(outputs.ddoubles.get());
  pfgm::field_backward_references_cpu(backward);
  return outputs;
}

// The norm of the error of one row; rounded: on top of the rounding to float.
double row_error(const std::function<double(int64_t)>& actual, const double* expected, int64_t dim,
                 bool rounded = false) {
  double square = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double rounding = rounded ? std::fabs(expected[c]) * 0x1p-24 + 0x1p-149 : 0;
    const double excess = std::fabs(actual(c) - expected[c]) - rounding;
    square += excess < 0 ? 0 : excess * excess;  // NaN stays
  }
  return std::sqrt(square);
}

// The tangents of x + v and of the log mass, of those relative to the anchor's logit.
void check_push(const Problem& p, const Truth& truth, const Outputs& out, int64_t b,
                const std::function<void(const char*, double, double)>& check) {
  std::vector<double> to_anchor(p.dim);
  for (int64_t c = 0; c < p.dim; ++c)
    to_anchor[c] = p.value(out.anchor[b], c) - p.x[b * p.ld() + c];
  double size = 0;
  const double anchor = Truth::logit_tangent(p, b, to_anchor.data(), &size);
  const bool singular = truth.log_mass[b] == INFINITY;
  const double slope = out.slope[b] + (singular ? 0 : anchor);
  const auto pull = [&](int64_t c) {
    return out.pull[b * p.ld() + c] - out.slope[b] * truth.v[b * p.dim + c];
  };
  const double most = tolerance(p);
  check("pull", row_error(pull, &truth.pull[b * p.dim], p.dim), most * truth.pull_size[b]);
  check("slope", std::fabs(slope - truth.slope[b]), most * truth.slope_size[b]);
}

void check_query(const Problem& p, const Truth& truth, const Outputs& out, int64_t b) {
  const std::string name = p.name() + " row " + std::to_string(b);
  const auto check = [&](const char* what, double error, double allowed) {
    expect(error <= allowed, name, what, error, allowed);
  };
  const double most = tolerance(p), mass = truth.log_mass[b];
  const auto v = [&](int64_t c) { return out.displacement[b * p.ld() + c]; };
  const auto dx = [&](int64_t c) { return out.dx[b * p.ld() + c]; };
  check("displacement", row_error(v, &truth.v[b * p.dim], p.dim), most * truth.v_size[b]);
  check("dx", row_error(dx, &truth.dx[b * p.dim], p.dim), most * truth.dx_size[b]);
  check("dt", std::fabs(out.dt[b] - truth.dt[b]), most * truth.dt_size[b]);
  check_push(p, truth, out, b, check);
  const double units = 8 * 0x1p-52 * std::fabs(mass);  // all the digits that a large one has
  check("log mass", out.log_mass[b] == mass ? 0 : std::fabs(out.log_mass[b] - mass), 1e-6 + units);
  const double log_weight = truth.log_weights[b * p.count + out.anchor[b]];
  check("the anchor's weight", std::fabs(out.anchor_log_weight[b] - log_weight), most);
}

void check(const Problem& p, const Truth& truth, const Outputs& out) {
  for (int64_t b = 0; b < p.batch; ++b) check_query(p, truth, out, b);
  if (p.type == ValueType::kUint8) return;
  const bool rounded = p.type == ValueType::kFloat32;
  for (int64_t j = 0; j < p.count; ++j) {
    const auto dx0 = [&](int64_t c) { return out.dx0(j * p.dim + c); };
    const double error = row_error(dx0, &truth.dx0[j * p.dim], p.dim, rounded);
    const double allowed = tolerance(p) * truth.dx0_size[j];
    expect(error <= allowed, p.name() + " reference " + std::to_string(j), "dx0", error, allowed);
  }
}

constexpr ValueType kTypes[] = {ValueType::kFloat32, ValueType::kFloat64, ValueType::kUint8};

// Each dimension with each type of values and of queries; the rest by lot, as far as N · B · d
// stays below a bound that keeps the time short.
std::vector<Spec> drawn_cases() {
  constexpr int64_t dims[] = {1,  2,  3,   5,   8,   16,  17,  31,  32,  33,   48,  63,
                              64, 65, 100, 255, 256, 257, 300, 784, 785, 1023, 3072};
  constexpr int64_t batches[] = {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130};
  constexpr int64_t counts[] = {1, 2, 3, 7, 63, 64, 65, 255, 256, 257, 513, 1000};
  constexpr int threads[] = {1, 2, 3, 7};
  const double Ds[] = {1, 0, 2.5, INFINITY};
  Random random(1);
  std::vector<Spec> cases;
  for (const int64_t dim : dims) {
    for (int i = 0; i < 6; ++i) {
      const Data data = static_cast<Data>(random.below(5));
      Spec spec{0,
                0,
                dim,
                Ds[random.below(4)],
                kTypes[i / 2],
                i % 2 == 0,
                data,
                random.below(2) == 0,
                threads[random.below(4)]};
      do {
        spec.batch = batches[random.below(12)];
        spec.count = counts[random.below(12)];
      } while (spec.batch * spec.count * dim > 300'000);
      spec.encode = spec.type == ValueType::kFloat32 && random.below(2) == 0;
      cases.push_back(spec);
    }
  }
  return cases;
}

// What a draw may miss: several tiles of queries and blocks of references at once, with a
// remainder of each; more threads than tasks.
std::vector<Spec> named_cases() {
  constexpr ValueType f32 = ValueType::kFloat32, f64 = ValueType::kFloat64, u8 = ValueType::kUint8;
  return {
      {0, 7, 3, 1, f32, true, Data::kNormal, false, 2},
      {0, 7, 300, 1, u8, true, Data::kGrid, false, 2},
      {130, 1000, 2, 1, f32, true, Data::kNormal, true, 3},
      {65, 513, 32, INFINITY, f32, true, Data::kDuplicates, true, 2},
      {17, 257, 31, 2.5, f32, true, Data::kOffset, true, 7},
      {65, 513, 33, 1, f32, true, Data::kNormal, true, 2},
      {63, 257, 65, 1, f32, true, Data::kDuplicates, true, 3, true},
      {17, 513, 255, 1, f32, true, Data::kNormal, true, 2},
      {9, 1000, 257, 1, f32, true, Data::kGrid, true, 3, true},
      {17, 513, 784, 1, f32, true, Data::kGrid, true, 2},
      {9, 513, 784, INFINITY, f32, true, Data::kNormal, true, 3},
      {15, 257, 785, 1, u8, true, Data::kGrid, true, 2, true},
      {65, 65, 784, 1, u8, true, Data::kDuplicates, true, 7},
      {9, 513, 300, 1, u8, true, Data::kNormal, true, 2},
      {9, 65, 3072, 1, u8, true, Data::kGrid, true, 3},
      {8, 63, 3072, 1, f32, true, Data::kOffset, false, 2},
      {9, 257, 300, 2.5, f64, false, Data::kDuplicates, true, 2},
      {1, 1000, 64, 1, f32, true, Data::kNormal, true, 7},
      {64, 1, 1, 0, f32, true, Data::kNormal, false, 7},
  };
}

void run_case(const Spec& spec, uint64_t seed, const std::vector<std::string>& isas) {
  const Problem problem(spec, seed);
  const Truth truth(problem);
  for (const std::string& isa : isas) {
    pfgm::use_instruction_set(isa.c_str());
    const Outputs outputs = compute(problem);
    check(problem, truth, outputs);
    if (spec.num_threads == 1) continue;
    expect(outputs.same_bits(compute(problem)), spec.name(), "two runs differ");
  }
}

bool is_nan(const Array<double>& rows, int64_t row, int64_t ld, int64_t dim) {
  return std::any_of(&rows[row * ld], &rows[row * ld] + dim, [](double v) { return v != v; });
}

// What is not finite in a query makes its row NaN and no other.
void run_spoilt_queries(const Spec& spec, double bad) {
  Problem problem(spec, 5);
  const Truth truth(problem);
  const int64_t row = spec.batch / 2;
  problem.x[row * spec.ld() + spec.dim / 2] = bad;
  problem.t[row + 1] = std::isinf(spec.D) ? 0 : NAN;
  const Outputs out = compute(problem);
  for (int64_t b = 0; b < spec.batch; ++b) {
    if (b != row && b != row + 1) {
      check_query(problem, truth, out, b);
    } else {
      expect(is_nan(out.displacement, b, spec.ld(), spec.dim) && std::isnan(out.log_mass[b]) &&
                 is_nan(out.dx, b, spec.ld(), spec.dim) && is_nan(out.pull, b, spec.ld(), spec.dim),
             spec.name(), "a query that is not finite");
    }
  }
}

// What is not finite in a reference makes every row NaN.
void run_spoilt_reference(const Spec& spec, int64_t j, double bad) {
  Problem problem(spec, 5);
  problem.set_value(j, spec.dim - 1, bad);
  const Outputs out = compute(problem);
  for (int64_t b = 0; b < spec.batch; ++b) {
    expect(is_nan(out.displacement, b, spec.ld(), spec.dim) && std::isnan(out.log_mass[b]),
           spec.name(), "a reference that is not finite");
  }
}

// Returns the number of problems.
int run_not_finite() {
  const struct {
    ValueType type;
    bool single;
    Data data;
  } kinds[] = {{ValueType::kFloat32, true, Data::kNormal},
               {ValueType::kFloat32, true, Data::kGrid},
               {ValueType::kFloat64, false, Data::kNormal},
               {ValueType::kUint8, true, Data::kGrid}};
  int problems = 0;
  for (const int64_t dim : {3, 32, 40, 300}) {
    for (const double D : {1.0, double{INFINITY}}) {
      for (const auto& kind : kinds) {
        const Spec spec{9, 65, dim, D, kind.type, kind.single, kind.data, true, 2};
        for (const double bad : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
          run_spoilt_queries(spec, bad);
          ++problems;
          if (kind.type == ValueType::kUint8) continue;
          for (const int64_t j : {0, 33, 64}) run_spoilt_reference(spec, j, bad);
          problems += 3;
        }
      }
    }
  }
  return problems;
}

bool refuses(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void run_refusals() {
  const Problem problem({9, 5, 3, 1, ValueType::kFloat32, true, Data::kNormal, false, 2}, 7);
  const std::vector<std::pair<const char*, std::function<void(FieldParams*)>>> faults = {
      {"batch < 0", [](FieldParams* p) { p->batch = -1; }},
      {"count = 0", [](FieldParams* p) { p->count = 0; }},
      {"dim = 0", [](FieldParams* p) { p->dim = 0; }},
      {"half_k = 0", [](FieldParams* p) { p->half_k = 0; }},
      {"half_k < 0", [](FieldParams* p) { p->half_k = -1; }},
      {"half_k NaN", [](FieldParams* p) { p->half_k = NAN; }},
      {"no threads", [](FieldParams* p) { p->num_threads = 0; }},
      {"x null", [](FieldParams* p) { p->x = nullptr; }},
      {"t null", [](FieldParams* p) { p->t = nullptr; }},
      {"values null", [](FieldParams* p) { p->values = nullptr; }},
  };
  for (const auto& [name, spoil] : faults) {
    FieldParams params = inputs(problem);
    spoil(&params);
    for (const auto entry : {pfgm::field_forward_cpu, pfgm::field_backward_queries_cpu,
                             pfgm::field_backward_references_cpu, pfgm::prepare_references_cpu}) {
      expect(refuses([&] { entry(params); }), name, "was not refused");
    }
  }
  expect(refuses([&] { pfgm::prepare_references_cpu(inputs(problem)); }), "norms null",
         "was not refused");
  expect(refuses([] { pfgm::use_instruction_set("mmx"); }), "mmx", "was not refused");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas;
  for (int i = 1; i < argc; ++i) {
    if (refuses([&] { pfgm::use_instruction_set(argv[i]); })) {
      std::printf("skipped: %s, which this processor does not have\n", argv[i]);
    } else {
      isas.push_back(argv[i]);
    }
  }
  run_refusals();
  std::vector<Spec> specs = named_cases();
  for (const Spec& spec : drawn_cases()) specs.push_back(spec);
  for (size_t i = 0; i < specs.size(); ++i) run_case(specs[i], i, isas);
  int not_finite = 0;
  for (const std::string& isa : isas) {
    pfgm::use_instruction_set(isa.c_str());
    not_finite += run_not_finite();
  }
  std::printf("%zu cases with each of", specs.size());
  for (const std::string& isa : isas) std::printf(" %s", isa.c_str());
  std::printf("; %d that are not finite; %d wrong\n", not_finite, failures);
  return failures == 0 && !isas.empty() ? 0 : 1;
}
