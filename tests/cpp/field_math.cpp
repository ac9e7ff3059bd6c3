// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels on the CPU (see shim/cuda_runtime.h) on one case:
//
//   field_math CASE RESULT
//
// CASE: int64 batch, count, dim, value type, num_splits; double half_k, x (B, d),
// t (B,); values (N, d); float table (256,) for 8-bit values.
// RESULT: double displacement (B, d), log_mass (B,), anchor_log_weight (B,); int64 anchor
// (B,).
#include <cmath>
#include <fstream>
#include <iostream>

#include "../../csrc/cuda/field_forward.cu"

namespace {

template <class T>
std::vector<T> read(std::ifstream& file, int64_t count) {
  std::vector<T> data(count);
  if (!file.read(reinterpret_cast<char*>(data.data()), count * sizeof(T))) {
    throw std::runtime_error("the case ends early");
  }
  return data;
}

void run(const char* input, const char* output) {
  std::ifstream file(input, std::ios::binary);
  const auto header = read<int64_t>(file, 5);
  pfgm::FieldParams p{};
  p.batch = header[0];
  p.count = header[1];
  p.dim = header[2];
  p.value_type = static_cast<pfgm::ValueType>(header[3]);
  p.num_splits = static_cast<int>(header[4]);
  p.half_k = read<double>(file, 1)[0];
  const auto x = read<double>(file, p.batch * p.dim), t = read<double>(file, p.batch);
  constexpr int64_t kBytes[] = {4, 8, 1};  // per value of each type
  const auto values = read<char>(file, p.count * p.dim * kBytes[header[3]]);
  const bool coded = p.value_type == pfgm::ValueType::kUint8;
  const auto table = read<float>(file, coded ? 256 : 0);
  p.x = x.data();
  p.t = t.data();
  p.values = values.data();
  p.table = table.data();

  // Exactly as large as the kernels may write, and poisoned.
  const int64_t parts = p.num_splits * p.batch;
  std::vector<double> displacement(parts * p.dim, NAN), nearest(parts, NAN), sum(parts, NAN);
  std::vector<double> log_mass(p.batch, NAN), anchor_log_weight(p.batch, NAN);
  std::vector<int64_t> anchor(parts, -1);
  p.displacement = displacement.data();
  p.nearest = nearest.data();
  p.sum = sum.data();
  p.anchor = anchor.data();
  p.log_mass = log_mass.data();
  p.anchor_log_weight = anchor_log_weight.data();
  pfgm::field_forward_cuda(p);

  std::ofstream result(output, std::ios::binary);
  const auto write = [&](const auto& data, int64_t count) {
    result.write(reinterpret_cast<const char*>(data.data()), count * sizeof(data[0]));
  };
  write(displacement, p.batch * p.dim);
  write(log_mass, p.batch);
  write(anchor_log_weight, p.batch);
  write(anchor, p.batch);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 3) throw std::invalid_argument("expected a case and a result");
    run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
