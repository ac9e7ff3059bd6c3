// SPDX-License-Identifier: Apache-2.0
// Fused multiply-adds as fast as this machine does them: independent chains that stay in registers.

namespace {

// As many chains as hide the latency of an addition (4 cycles on 2 units: at least 8), and still
// leave registers for the two operands.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64, chains = 24;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, chains = 12;
#else
constexpr int vector_bytes = 16, chains = 12;
#endif
constexpr int lanes = vector_bytes / sizeof(float);
using Vector [[gnu::vector_size(vector_bytes)]] = float;

void run(long steps, float factor, float addend, float* sum) {
  const Vector a = Vector{} + factor, b = Vector{} + addend;
  Vector chain[chains];
  for (int i = 0; i < chains; ++i)
    chain[i] = Vector{} + float(i);  // equal chains would be computed once
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i) chain[i] = chain[i] * a + b;
  }
  *sum = 0;
  for (const Vector& values : chain)
    for (int lane = 0; lane < lanes; ++lane) *sum += values[lane];
}

}  // namespace

extern "C" int chain_count() { return chains; }
extern "C" int lane_count() { return lanes; }

// Each thread takes `lanes` values from each number below `chains` through steps of
// value = value * factor + addend, and writes their sum to sums[thread].
extern "C" void fma_chains(int threads, long steps, float factor, float addend, float* sums) {
  // The threads that the products wait for spin: any others would compete with them.
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int i = 0; i < threads; ++i) run(steps, factor, addend, sums + i);
}
