// SPDX-License-Identifier: Apache-2.0
// Problems for the CPU kernels: shapes, awkward data, and arrays that end where they must.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/poisson_field.h"

// An array on the heap with not a byte to spare, so that the sanitizer sees the first one beyond
// it. Every byte starts as 0xFF: NaN in a floating-point number, out of range in an index.
template <class T>
class Array {
 public:
  // skewed: one element off the 16-byte boundary that the allocator gives.
  explicit Array(int64_t size, bool skewed = false)
      : size_(size), memory_(new char[bytes() + (skewed ? sizeof(T) : 0)]) {
    data_ = reinterpret_cast<T*>(memory_.get() + (skewed ? sizeof(T) : 0));
    std::memset(static_cast<void*>(data_), 0xFF, bytes());
  }
  T* get() const { return size_ > 0 ? data_ : nullptr; }  // as an empty tensor's address
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  bool same_bits(const Array& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, bytes()) == 0;
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

  int64_t size_;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

enum class Data {
  kNormal,      // 8-bit: any codes, and a table that is not affine
  kGrid,        // −1 + 2u/255, u = 0 … 255
  kOffset,      // around 1000, within 1e-3 (8-bit: within 1)
  kDuplicates,  // pairs, by turns equal and 1e-5 (8-bit: one code) apart
  kEqual,       // all references the same
};

struct Spec {
  int64_t batch, count, dim;
  double D;
  pfgm::ValueType type;
  bool single;  // whether the queries are float32
  Data data;
  bool skewed;
  int num_threads;
  bool encode = false;  // whether floats are looked at for a grid

  int64_t ld() const { return (dim + 7) / 8 * 8; }

  std::string name() const {
    static const char* const types[] = {"float32", "float64", "uint8"};
    static const char* const kinds[] = {"normal", "grid", "offset", "duplicates", "equal"};
    return "B=" + std::to_string(batch) + " N=" + std::to_string(count) +
           " d=" + std::to_string(dim) + " D=" + std::to_string(D) + " " +
           types[static_cast<int>(type)] + (single ? " single " : " double ") +
           kinds[static_cast<int>(data)] + (skewed ? " skewed" : "") + (encode ? " encode" : "") +
           " threads=" + std::to_string(num_threads);
  }
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double log_uniform(double low, double high) {
    return low * std::pow(high / low, std::uniform_real_distribution<double>()(engine_));
  }
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

struct Problem : Spec {
  Array<double> x, t;     // (B, ld), (B,)
  Array<double> g, g_m;   // cotangents of v (B, ld) and of the log mass (B,)
  Array<float> floats;    // (N, d), of the three the one that `type` names
  Array<double> doubles;  // (N, d)
  Array<uint8_t> codes;   // (N, d)
  Array<float> table;     // (256,) for codes

  Problem(const Spec& spec, uint64_t seed)
      : Spec(spec),
        x(batch * ld(), skewed),
        t(batch, skewed),
        g(batch * ld(), skewed),
        g_m(batch, skewed),
        floats(type == pfgm::ValueType::kFloat32 ? count * dim : 0, skewed),
        doubles(type == pfgm::ValueType::kFloat64 ? count * dim : 0, skewed),
        codes(type == pfgm::ValueType::kUint8 ? count * dim : 0, skewed),
        table(type == pfgm::ValueType::kUint8 ? 256 : 0, skewed) {
    Random random(seed);
    fill_table();
    for (int64_t j = 0; j < count; ++j) fill_reference(j, random);
    for (int64_t b = 0; b < batch; ++b) fill_query(b, random);
  }

  const void* values() const {
    return type == pfgm::ValueType::kFloat32   ? static_cast<const void*>(floats.get())
           : type == pfgm::ValueType::kFloat64 ? static_cast<const void*>(doubles.get())
                                               : static_cast<const void*>(codes.get());
  }

  // Element c of reference j.
  double value(int64_t j, int64_t c) const {
    const int64_t i = j * dim + c;
    return type == pfgm::ValueType::kFloat32   ? floats[i]
           : type == pfgm::ValueType::kFloat64 ? doubles[i]
                                               : table[codes[i]];
  }

  void set_value(int64_t j, int64_t c, double value) {
    const int64_t i = j * dim + c;
    if (type == pfgm::ValueType::kFloat32) {
      floats[i] = static_cast<float>(value);
    } else {
      doubles[i] = value;
    }
  }

 private:
  static double grid(int64_t code) { return static_cast<float>(-1 + 2 * code / 255.0); }

  void fill_table() {
    for (int64_t i = 0; i < table.size(); ++i) {
      const double u = i / 255.0;
      table[i] = static_cast<float>(data == Data::kNormal   ? 4 * u * u - 1.3 * u
                                    : data == Data::kOffset ? 999 + 2 * u
                                                            : grid(i));
    }
  }

  void fill_reference(int64_t j, Random& random) {
    const bool first =
        j == 0 || (data != Data::kEqual && (data != Data::kDuplicates || j % 2 == 0));
    for (int64_t c = 0; c < dim; ++c) {
      const int64_t i = j * dim + c, code = random.below(256);
      const double noise = random.normal();
      if (type == pfgm::ValueType::kUint8) {
        codes[i] = static_cast<uint8_t>(first ? code : codes[i - dim]);
        if (!first && data == Data::kDuplicates && c == j / 4 % dim) codes[i] ^= j / 2 % 2;
      } else if (!first) {
        set_value(j, c,
                  value(j - 1, c) + (data == Data::kDuplicates ? j / 2 % 2 * 1e-5 : 0) * noise);
      } else {
        set_value(j, c,
                  data == Data::kGrid     ? grid(code)
                  : data == Data::kOffset ? 1000 + 1e-3 * noise
                                          : noise);
      }
    }
  }

  // By turns a point of the data's own kind, one of Eq. 11, a reference and a point beside one.
  void fill_query(int64_t b, Random& random) {
    const int64_t j = random.below(count), other = random.below(count);
    t[b] = random.log_uniform(1e-5, 1e4);
    const double radii[] = {0, t[b], 0, 1e-3};
    const double radius = radii[b % 4];
    double nearest = INFINITY;
    for (int64_t c = 0; c < ld(); ++c) {
      const double mirrored = 2 * value(j, c % dim) - value(other, c % dim);
      const double point = (b % 4 == 0 ? mirrored : value(j, c % dim)) + radius * random.normal();
      x[b * ld() + c] = c >= dim ? 0 : round(point);
      g[b * ld() + c] = c >= dim ? 0 : round(random.normal());
    }
    for (int64_t i = 0; i < count; ++i) {
      double square = 0;
      for (int64_t c = 0; c < dim; ++c) square += std::pow(value(i, c) - x[b * ld() + c], 2);
      nearest = std::fmin(nearest, std::sqrt(square));
    }
    // Below that, logits s/(2t²) that float64 cannot hold to 1e-10.
    if (std::isinf(D)) t[b] = std::fmax(t[b], 1e-2 * nearest);
    if (b % 8 == 2 && !std::isinf(D)) t[b] = 0;  // on a reference: the singular point
    if (b % 3 == 1) t[b] = -t[b];
    g_m[b] = random.normal();
  }

  double round(double v) const { return single ? static_cast<float>(v) : v; }
};
