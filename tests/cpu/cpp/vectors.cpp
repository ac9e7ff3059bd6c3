// SPDX-License-Identifier: Apache-2.0
// Is each function of vectors.h, and the product of 16-bit integers, what it says of every lane?
// Prints what is not; built once for each instruction set by tests/cpu/test_vectors.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../../csrc/cpu/common/product.h"

namespace {

using namespace pfgm;

int failures = 0;

void expect(bool good, const char* what, int lane, double actual, double expected) {
  if (good || ++failures > 20) return;
  std::printf("%s: lane %d is %.9g, not %.9g\n", what, lane, actual, expected);
}

template <class Vector, class Expected>
void equal(const char* what, Vector actual, const Expected& expected) {
  for (size_t i = 0; i < sizeof actual / sizeof actual[0]; ++i) {
    const double is = actual[i], should = expected(i);
    expect(is == should, what, static_cast<int>(i), is, should);
  }
}

template <class T>
void widens(const std::vector<T>& values, const char* what) {
  for (size_t start = 0; start + kLanes <= values.size(); ++start) {
    equal(what, widen(&values[start]), [&](size_t i) { return double(values[start + i]); });
  }
}

void test_conversions(std::mt19937& engine) {
  std::vector<float> floats = {0x1p-149f, -0x1p-126f, 0, INFINITY, 3.4e38f, -1, 0x1.fffffep127f};
  std::vector<int32_t> integers = {INT32_MIN, INT32_MAX, -1, 0, 1, 0x1000001};
  std::vector<double> doubles = {1 + 0x1p-24, 1 + 0x1.8p-24, -1e39, 1e-46, 0x1.ffffffp127, 1e-40};
  std::vector<uint8_t> bytes(256);
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  for (int i = 0; i < 64; ++i) {
    integers.push_back(static_cast<int32_t>(engine()));
    doubles.push_back(std::normal_distribution<double>()(engine));
    floats.push_back(static_cast<float>(doubles.back()));
  }
  widens(floats, "widen floats");
  widens(integers, "widen integers");
  widens(bytes, "widen bytes");
  for (size_t start = 0; start + kFloatLanes <= bytes.size(); ++start) {
    equal("widen_codes", widen_codes(&bytes[start]), [&](size_t i) { return bytes[start + i]; });
  }
  for (size_t start = 0; start + kFloatLanes <= doubles.size(); ++start) {
    const double* p = &doubles[start];
    const auto rounded = [&](size_t i) { return static_cast<float>(p[i]); };
    equal("narrow", narrow(load(p), load(p + kLanes)), rounded);
    equal("round_to_float", round_to_float(load(p)), rounded);
    float out[kLanes];
    narrow(out, load(p));
    for (int i = 0; i < kLanes; ++i) expect(out[i] == rounded(i), "store", i, out[i], rounded(i));
  }
}

template <class Mask>
void test_bits(std::mt19937& engine) {
  constexpr int lanes = sizeof(Mask) / sizeof(Mask{}[0]);
  for (int n = 0; n < 100; ++n) {
    const unsigned expected = n < lanes ? 1u << n : engine() % (1u << lanes);
    Mask mask;
    for (int i = 0; i < lanes; ++i) mask[i] = expected >> i & 1 ? -1 : 0;
    expect(bits(mask) == expected, "bits", lanes, bits(mask), expected);
  }
}

template <class Root>
void test_roots(const char* what, double most, const Root& root) {
  double worst = 0;
  for (float v = 0x1p-126f; v < 1e38f; v *= 1.0007f) {
    const VecF roots = root(broadcast(v));
    for (int i = 0; i < kFloatLanes; ++i) {
      worst = std::fmax(worst, std::fabs(roots[i] * std::sqrt(double{v}) - 1));
    }
  }
  expect(worst <= most, what, 0, worst, most);
}

void test_below(std::mt19937& engine) {
  for (int n = 0; n < 100; ++n) {
    pfgm::VecF a, b;
    unsigned expected = 0;
    for (int i = 0; i < kFloatLanes; ++i) {
      a[i] = static_cast<float>(engine() % 3);
      b[i] = engine() % 8 == 0 ? NAN : static_cast<float>(engine() % 3);
      expected |= (a[i] < b[i] ? 1u : 0u) << i;
    }
    expect(pfgm::below(a, b) == expected, "below", n, pfgm::below(a, b), expected);
  }
}

// Relative to the result, of values ratio apart from `from` to `to`, both ways from zero.
template <class Function, class Exact>
void test_function(const char* what, double most, const Function& function, const Exact& exact,
                   double from, double to) {
  double worst = 0;
  for (double v = from; std::fabs(v) < std::fabs(to); v *= 1.0003) {
    const float argument = static_cast<float>(v);
    const double right = exact(double{argument});
    worst = std::fmax(worst, std::fabs(function(broadcast(argument))[0] / right - 1));
  }
  expect(worst <= most, what, to, worst, most);
}

void test_functions() {
  const auto log = [](double v) { return std::log1p(v); };
  const auto exp = [](double v) { return std::exp(v); };
  test_function("log1p_finite", 1.7e-7, pfgm::log1p_finite, log, 1e-30, 1e30);
  test_function("log1p_finite", 1.7e-7, pfgm::log1p_finite, log, -1e-30, -0.99999);
  test_function("exp_normal", 3e-7, pfgm::exp_normal, exp, 1e-30, 88);
  test_function("exp_normal", 3e-7, pfgm::exp_normal, exp, -1e-30, -87);
}

// Of which bits an exponent is made: of some NaN that would be a number.
void test_exp_keeps_nan() {
  const Vec doubles = pfgm::exp(broadcast(std::nan("1")));
  const VecF floats = pfgm::exp(broadcast(std::nanf("1")));
  equal("exp of NaN is NaN", doubles != doubles, [](size_t) { return -1; });
  equal("exp of NaN is NaN in float", floats != floats, [](size_t) { return -1; });
}

void test_short_products(std::mt19937& engine) {
  std::uniform_int_distribution<int> values(-32000, 32000);
  for (int n = 0; n < 100; ++n) {
    int16_t a[2], packed[2 * kFloatLanes];
    int32_t pair, pairs[kFloatLanes], before[kFloatLanes];
    for (int16_t& v : a) v = static_cast<int16_t>(values(engine));
    for (int16_t& v : packed) v = static_cast<int16_t>(values(engine));
    for (int32_t& v : before) v = values(engine);
    std::memcpy(&pair, a, sizeof pair);
    std::memcpy(pairs, packed, sizeof pairs);
    equal("ShortProduct", ShortProduct::add(load(before), pair, pairs),
          [&](size_t i) { return before[i] + a[0] * packed[2 * i] + a[1] * packed[2 * i + 1]; });
  }
}

}  // namespace

int main() {
  std::mt19937 engine(1);
  test_conversions(engine);
  test_bits<pfgm::VecInt>(engine);
  test_bits<pfgm::VecFInt>(engine);
  test_below(engine);
  test_functions();
  test_exp_keeps_nan();
  test_roots("rough_reciprocal_root", pfgm::kRoughRoot, pfgm::rough_reciprocal_root);
  test_roots("approximate_reciprocal_root", 0x1p-14, pfgm::approximate_reciprocal_root);
  test_short_products(engine);
  return failures > 0;
}
