// SPDX-License-Identifier: Apache-2.0
// Checks the intrinsics on the GPU that runs it, and says how its tensor cores sum:
//
//   nvcc -std=c++17 -arch=native -o device_check tests/cuda/emulation/device_check.cu &&
//   ./device_check
#include "checks.cuh"

int main() {
  using namespace pfgm;
  int failures = 0;
  const auto run = [&](const char* name, auto check) {
    try {
      check();
      std::printf("%s: as the manual says\n", name);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name, error.what());
      ++failures;
    }
  };
  run("multiply", check_multiply);
  run("load_matrices", [] { check_load(false); });
  run("load_matrices_transposed", [] { check_load(true); });
  run("product", [] { check_product(false); });
  run("product of a transposed operand", [] { check_product(true); });
  run("copy_async", check_copy);
  if (failures == 0) std::printf("%s", describe_tensor_core().c_str());
  return failures;
}
