// SPDX-License-Identifier: Apache-2.0
// References, queries and cotangents as the tensor cores read them: y = (value − origin)/unit as a
// sum of bfloat16 parts, each of which holds 8 bits more of it.
//
// 8-bit codes: unit is the step of their grid, y = code − 128, exact in one part. Floats: unit is
// 1, the origin a point amid the data. With x' = (x − origin)/unit
//
//     s_j / unit² = ‖x'‖² + t²/unit² + ‖y_j‖² − 2 x'·y_j
#include "float_math.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

constexpr int kCodeOrigin = 128;
constexpr int kSample = 1024;  // references among which equal ones are looked for
constexpr int kCrowd = 8;      // so many of them: rounding errors do not average out

constexpr int kMeanSample = 256;  // references whose mean is that of all, nearly

// Origin and unit, and the mean of the y, a column to a thread.
__global__ void __launch_bounds__(kThreads)
    origin_kernel(const __grid_constant__ SplitArguments a) {
  const FieldParams& p = a.p;
  const bool codes = p.value_type == ValueType::kUint8;
  const double low = codes ? p.table[0] : 0, unit = codes ? (p.table[255] - low) / 255 : 1;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column == 0) {
    double deviation = 0;
    for (int code = 0; codes && code < 256; ++code) {
      const double off = ::fabs(p.table[code] - (low + unit * code)) / ::fabs(unit);
      if (!(off <= deviation)) deviation = off;
    }
    p.header[0] = unit;
    p.header[1] = deviation * ::sqrt(static_cast<double>(p.dim));
  }
  if (column >= p.dim) return;
  const int64_t rows = p.count < kMeanSample ? p.count : kMeanSample;
  double mean = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t index = i * p.count / rows * p.dim + column;
    mean += codes ? static_cast<const uint8_t*>(p.values)[index] : decode(p, index);
  }
  mean /= static_cast<double>(rows);
  p.origin[column] = codes ? low + kCodeOrigin * unit : static_cast<float>(mean);
  p.mean[column] = codes ? mean - kCodeOrigin : 0;
}

__device__ double load(const SplitArguments& a, int64_t row, int64_t column) {
  const FieldParams& p = a.p;
  const int64_t index = row * p.dim + column;
  switch (a.of) {
    case RowsOf::kCotangents:
      return p.grad_displacement[index];
    case RowsOf::kQueries:
      return (load_query(p, index) - p.origin[column]) / p.header[0];
    default:
      if (p.value_type == ValueType::kUint8) {
        return static_cast<int>(static_cast<const uint8_t*>(p.values)[index]) - kCodeOrigin;
      }
      return decode(p, index) - p.origin[column];
  }
}

// A warp takes a row: its parts, ‖y‖², and a mark. Of a reference the mark is a sum that is the
// same for equal references and hardly else; of a query what its parts leave of its product with
// the mean of the references, an error that all of its products would share; of a cotangent g that
// and g_m − g·v + g·(origin − x), over unit.
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitArguments a) {
  const FieldParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.count) return;
  if (a.of == RowsOf::kQueries) a.left.clear();
  const int64_t width = width_of(p.dim);
  double square = 0, mark = 0, shift = 0;
  for (int64_t first = 2 * lane; first < width; first += 2 * kWarp) {
    uint32_t packed[kMaxParts] = {};
    for (int half = 0; half < 2; ++half) {
      const int64_t column = first + half;
      if (column >= p.dim) break;
      double y = load(a, row, column);
      square += y * y;
      if (a.of == RowsOf::kReferences) mark += y * static_cast<double>(column * 40503 % 65536);
      if (a.of == RowsOf::kCotangents) {
        shift += y * (p.origin[column] - load_query(p, row * p.dim + column));
      }
      float remainder = static_cast<float>(y);
      PFGM_UNROLL
      for (int part = 0; part < kMaxParts; ++part) {
        if (part >= a.num_parts) break;
        const uint16_t bits = to_bfloat16(remainder);
        packed[part] |= static_cast<uint32_t>(bits) << (16 * half);
        remainder -= from_bfloat16(bits);
        y -= static_cast<double>(from_bfloat16(bits));
      }
      if (a.of != RowsOf::kReferences) mark += y * p.mean[column];
    }
    PFGM_UNROLL
    for (int part = 0; part < kMaxParts; ++part) {
      if (part >= a.num_parts) break;
      uint16_t* const to = a.parts + part * a.plane + row * width + first;
      *reinterpret_cast<uint32_t*>(to) = packed[part];
    }
  }
  square = warp_sum(square);
  mark = warp_sum(mark);
  shift = warp_sum(shift);
  if (lane != 0) return;
  if (a.of == RowsOf::kCotangents)
    mark += (p.grad_log_mass[row] - p.projection[row] + shift) / p.header[0];
  a.squares[row] = square;
  a.marks[row] = mark;
}

// What is known of all references together, by the first block; and p.squares, by all.
__global__ void __launch_bounds__(kThreads)
    summarise_kernel(const __grid_constant__ SplitArguments a) {
  const FieldParams& p = a.p;
  const int64_t count = a.count;
  const int thread = static_cast<int>(threadIdx.x);
  const double centre = (a.squares[0] + a.squares[count / 2] + a.squares[count - 1]) / 3;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + thread; row < count;
       row += threads) {
    p.squares[row] = static_cast<float>(a.squares[row] - centre);
  }
  if (blockIdx.x != 0) return;

  double* const hashes = shared_memory<double>();  // (kSample,)
  double* const largest = hashes + kSample;        // (kThreads,)
  const int sample = static_cast<int>(count < kSample ? count : kSample);
  for (int i = thread; i < sample; i += kThreads) hashes[i] = a.marks[i * count / sample];
  double most = 0;
  for (int64_t row = thread; row < count; row += kThreads) {
    if (!(a.squares[row] <= most)) most = most == most ? a.squares[row] : most;  // NaN stays
  }
  largest[thread] = most;
  __syncthreads();
  int equal = 0;  // references of the sample that equal an earlier one
  for (int i = thread; i < sample; i += kThreads) {
    int j = 0;
    while (j < i && hashes[j] != hashes[i]) ++j;
    equal += j < i;
  }
  int* const counts = reinterpret_cast<int*>(largest + kThreads);  // (kThreads,)
  counts[thread] = equal;
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    if (!(largest[i] <= most)) most = most == most ? largest[i] : most;
    equal += counts[i];
  }
  p.header[2] = equal >= kCrowd ? 1 : 0;
  p.header[3] = ::sqrt(most);
  p.header[4] = centre;
}

}  // namespace

void split(const SplitArguments& a) {
  launch(split_kernel, divide_up(a.count, kWarps), kThreads, 0, a);
}

int64_t prepare_references_cuda(const FieldParams& p) {
  if (p.dim <= kMaxDirectDim && p.values && p.crowd && p.count > 0) {
    const DeviceGuard guard(p.device);
    count_crowd(p);
    return 1;
  }
  if (p.count < 1 || p.dim < 1 || p.num_parts < 1 || p.num_parts > kMaxParts) {
    throw std::invalid_argument("CUDA kernel called with sizes out of range");
  }
  if (!p.values || !p.header || !p.origin || !p.mean || !p.squares || !p.parts ||
      (p.value_type == ValueType::kUint8 && !p.table)) {
    throw std::invalid_argument("CUDA kernel called with a null pointer");
  }
  const DeviceGuard guard(p.device);
  Workspace workspace(p);
  SplitArguments a{};
  a.p = p;
  a.count = p.count;
  a.num_parts = p.num_parts;
  a.parts = p.parts;
  a.plane = p.plane;
  a.squares = workspace.take<double>(p.count);
  a.marks = workspace.take<double>(p.count);
  launch(origin_kernel, divide_up(p.dim, kThreads), kThreads, 0, a);
  split(a);
  constexpr int64_t kMostBlocks = 1024;
  const int64_t blocks = divide_up(p.count, kThreads);
  launch(summarise_kernel, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads,
         (kSample + kThreads) * sizeof(double) + kThreads * sizeof(int), a);
  return workspace.bytes();
}

}  // namespace pfgm
