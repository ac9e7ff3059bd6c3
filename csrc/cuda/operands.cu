// SPDX-License-Identifier: Apache-2.0
// References, queries and cotangents as the tensor cores read them: y = (value − origin)/unit as a
// sum of bfloat16 parts, each of which holds 8 bits more of it.
//
// 8-bit codes: unit is the step of their grid, y = code − 128, exact in one part. Floats: unit is
// 1, the origin a point amid the data. With x' = (x − origin)/unit
//
//     s_j / unit² = ‖x'‖² + t²/unit² + ‖y_j‖² − 2 x'·y_j
#include <algorithm>

#include "float_math.cuh"
#include "two_pass.cuh"

namespace pfgm {
namespace {

constexpr int kCodeOrigin = 128;
constexpr int kCrowd = 8;  // so many equal references: rounding errors do not average out
constexpr int64_t kCrowdedShare = 128;  // nor where of so many references one equals another
constexpr int kMeanSample = 256;        // references whose mean is that of all, nearly

// Origin and unit, and the mean of the y, a column to a thread; and the slots, emptied.
__global__ void __launch_bounds__(kThreads)
    origin_kernel(const __grid_constant__ SplitArguments a) {
  const FieldParams& p = a.p;
  const bool codes = p.value_type == ValueType::kUint8;
  const double low = codes ? p.table[0] : 0, unit = codes ? (p.table[255] - low) / 255 : 1;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = column; i < 2 + 2 * a.slots; i += threads) a.copies[i] = 0;
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

// Counts a reference among the copies, by ‖y‖² and a sum that is the same for equal ones and hardly
// else. It looks for its name from a slot on and leaves it in the first that is empty, so that the
// counts are the same in any order.
__device__ void count_copy(const SplitArguments& a, double square, double mark) {
  // To a millionth: copies that roundings tell apart mostly have one name.
  const auto norm = static_cast<uint64_t>(__double_as_longlong(square)) >> 32;
  const auto sum = static_cast<uint64_t>(__double_as_longlong(mark)) >> 30;
  const uint64_t place = (sum * 40503 + norm) * 0x9e3779b1u;
  const int name = static_cast<int>(place & 0x7fffffff) | 1;  // none is that of an empty slot
  int64_t index = static_cast<int64_t>(place >> 20);
  int* slot;
  int held;
  do {
    slot = a.copies + 2 + 2 * (index++ & (a.slots - 1));
    held = atomicCAS(slot, 0, name);
  } while (held != 0 && held != name);
  const int before = atomicAdd(slot + 1, 1);
  if (before == 0) return;
  atomicMax(a.copies, before);
  atomicAdd(a.copies + 1, 1);
}

// A warp takes a row: its parts, ‖y‖², and a mark. Of a query the mark is what its parts leave of
// its product with the mean of the references, an error that all of its products would share; of a
// cotangent g that and g_m − g·v + g·(origin − x), over unit. Copies of references are counted.
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
  if (a.of != RowsOf::kReferences) {
    a.marks[row] = mark;
  } else {
    count_copy(a, square, mark);
  }
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

  double* const largest = shared_memory<double>();  // (kThreads,)
  double most = 0;
  for (int64_t row = thread; row < count; row += kThreads) {
    if (!(a.squares[row] <= most)) most = most == most ? a.squares[row] : most;  // NaN stays
  }
  largest[thread] = most;
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    if (!(largest[i] <= most)) most = most == most ? largest[i] : most;
  }
  const int64_t copies = a.copies[0], equal = a.copies[1];
  p.header[2] = copies >= kCrowd || (equal >= kCrowd && equal * kCrowdedShare >= count) ? 1 : 0;
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
  a.slots = 1;
  while (a.slots < 2 * p.count) a.slots *= 2;
  a.copies = workspace.take<int>(2 + 2 * a.slots);
  constexpr int64_t kMostBlocks = 1024;
  const int64_t emptied = divide_up(a.slots, 4 * kThreads), columns = divide_up(p.dim, kThreads);
  launch(origin_kernel, std::max(columns, std::min(emptied, kMostBlocks)), kThreads, 0, a);
  split(a);
  const int64_t blocks = divide_up(p.count, kThreads);
  launch(summarise_kernel, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads,
         kThreads * sizeof(double), a);
  return workspace.bytes();
}

}  // namespace pfgm
