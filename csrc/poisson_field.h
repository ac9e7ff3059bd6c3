// SPDX-License-Identifier: Apache-2.0
// What crosses the boundary of the extension: one plain struct and the host entry points.
#pragma once

#include <cstdint>

namespace pfgm {

enum class ValueType : int { kFloat32, kFloat64, kUint8 };

// What the op makes of the displacement v: v, x + v, or scale · (v, −t)/(‖(v, −t)‖ + gamma).
enum class Output : int { kDisplacement, kMean, kField };

// The references in a few coordinates, 16-bit integers times unit (cpu/two_pass/sketch.h).
struct Sketch {
  int64_t dim;            // even
  const double* basis;    // (dim, d) orthonormal rows P
  const int16_t* points;  // (N, dim) P y_j / unit, of norm 32,000 at most
  const float* rest;      // (N,) the norm of what P leaves of y_j, at least
  double unit;
  double residual;  // the norm of what rounding to integers leaves of P y_j, at most
  double reach;     // the norm of what P leaves of a query for which few references are likely left
};
constexpr int kSketches = 2;

// Arrays are contiguous and row-major. B = batch, N = count, d = dim; ld is d rounded up to a
// multiple of 8 for the CPU kernels (columns beyond d are zero) and d for CUDA.
struct FieldParams {
  int64_t batch, count, dim;
  double half_k;    // (d + D)/2; infinity selects the Gaussian kernel
  const double* x;  // (B, ld), (B, d) in rows.cpp; null where x_single is there
  const double* t;  // (B,)
  // The first and the last + 1 of the references that each query sees, equal ones together; null
  // where all see all.
  const int64_t* ranges;  // (B, 2)
  const void* values;     // (N, d) of value_type
  const float* table;     // (256,) what 8-bit codes stand for; null for floating-point values
  ValueType value_type;

  // Whether the queries are float32, so that the kernels need not compute in double throughout.
  bool single;
  const float* x_single;  // (B, d) for CUDA and rows.cpp
  // CPU: what prepare_references wrote, or null (cpu/common/operands.h).
  double* norms;               // (N,)
  uint8_t* codes;              // (N, d)
  double* grid;                // (4 + d,)
  Sketch sketches[kSketches];  // of more and more columns; those that there are come first
  // The same for CUDA (cuda/operands.cu): y = (x0 − origin)/unit as a sum of num_parts bfloat16
  // parts, one for 8-bit codes, two for floats, or three where d ≤ 128. Rows of a part are d
  // rounded up to a multiple of 64 long, the rest zeros, and aligned to 16 bytes.
  double* header;   // (5,) unit; ‖x0 − (origin + unit · y)‖/unit at most; 1 if many references are
                    // equal, else 0; max ‖y‖; a number amid the ‖y‖²
  double* origin;   // (d,)
  double* mean;     // (d,) of a sample of the y
  float* squares;   // (N,) ‖y‖² less header[4]
  uint16_t* parts;  // (num_parts, N, width), one part `plane` elements after the other
  int64_t plane;
  int num_parts;
  int* crowd;  // (8,) where nothing else is prepared: equal references in parts of a sample

  // Forward.
  double* displacement;       // (B, ld)
  int64_t* anchor;            // (B,)
  double* log_mass;           // (B,)
  double* anchor_log_weight;  // (B,) output of the forward pass, input of the backward pass
  // Backward.
  double* anchor_square;      // (B,) squared distance of the anchor
  double* grad_displacement;  // (B, ld)
  double* projection;         // (B,) grad_displacement · v
  double* grad_log_mass;      // (B,)
  const double* tilt;         // (B,) forward mode (cpu/common/pull.h), or null
  double* dx;                 // (B, ld), (B, d) in rows.cpp: 2 Σ_j c_j (x0_j − x), which CUDA adds
                              // to what is there; for the CPU kernels null where it is not wanted
  double* dt;                 // (B,) with a tilt 2 Σ_j c_j; likewise
  void* dvalues;              // (N, d) of value_type, or null

  // What is done of each query before and after the sums (cpu/rows.cpp, cuda/rows.cu).
  Output output;
  double gamma, scale;
  bool result_single;  // whether result and residual are float
  void* result;        // (B, d), for a field (B, d + 1); where gradients begin its cotangents, as
                       // log_mass is then, or null
  void* residual;      // (B, d) v − (x0_a − x), or null

  int num_threads;
  // CUDA only. Where workspace is null, entry points compute nothing and return how many bytes of
  // it they need; unless launches is null, they also say what they would launch: launches[0] grows
  // by the number of kernels, and behind it stands of how many blocks each is.
  void* workspace;
  int64_t* launches;
  int device;
  void* stream;
};

void field_forward_cpu(const FieldParams& params);
void field_backward_queries_cpu(const FieldParams& params);
void field_backward_references_cpu(const FieldParams& params);
void prepare_references_cpu(const FieldParams& params);
void field_finish_cpu(const FieldParams& params);
void field_begin_cpu(const FieldParams& params);
int64_t field_forward_cuda(const FieldParams& params);
int64_t field_backward_cuda(const FieldParams& params);
int64_t prepare_references_cuda(const FieldParams& params);
int64_t field_finish_cuda(const FieldParams& params);
int64_t field_begin_cuda(const FieldParams& params);

// Why the CUDA runtime of the extension cannot run here (no device, an old driver), or null.
const char* cuda_unavailable();

// The instruction set that the CPU kernels run with: the best of this processor, or the one that a
// test asked for.
const char* instruction_set();
void use_instruction_set(const char* name);

}  // namespace pfgm
