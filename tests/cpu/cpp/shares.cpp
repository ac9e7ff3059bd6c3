// SPDX-License-Identifier: Apache-2.0
// Counts the work of the busiest thread, over the mean, in each road's shares (common/shares.h):
// the tasks that the kernels make, each taken by the thread that is free first. A line for each
// stage, number of queries and number of threads:
//
//   stage, queries, threads asked for, threads that there is work for, tasks, imbalance
#define PFGM_ISA portable

#include <algorithm>
#include <cstdio>
#include <vector>

#include "../../../csrc/cpu/common/kernels.h"
#include "../../../csrc/cpu/direct/direct.h"
#include "../../../csrc/cpu/exact/exact.h"
#include "../../../csrc/cpu/fused/fused.h"
#include "../../../csrc/cpu/two_pass/dense.h"
#include "../../../csrc/cpu/two_pass/screen.h"

namespace pfgm {
namespace {

typedef std::vector<double> Tasks;  // the work of each

double imbalance(const Tasks& tasks, int num_threads) {
  std::vector<double> busy(num_threads);
  double total = 0;
  for (const double work : tasks) {
    *std::min_element(busy.begin(), busy.end()) += work;
    total += work;
  }
  return *std::max_element(busy.begin(), busy.end()) * num_threads / total;
}

int64_t asked;  // threads

void print(const char* stage, const FieldParams& p, const Tasks& tasks) {
  std::printf("%s %ld %ld %d %zu %.4f\n", stage, long{p.batch}, long{asked}, p.num_threads,
              tasks.size(), imbalance(tasks, p.num_threads));
}

template <class Weight>
void print(const char* stage, const FieldParams& p, const Shares& shares, const Weight& weight) {
  Tasks tasks(shares.count());
  for (int64_t share = 0; share < shares.count(); ++share) {
    shares.for_pieces(share, [&](int64_t n) {
      const Piece& piece = shares.pieces[n];
      tasks[share] += static_cast<double>(weight(piece.tile) * (piece.last - piece.first));
    });
  }
  print(stage, p, tasks);
}

// Of blocks of `size` of `count` items.
Tasks blocks(int64_t count, int64_t size) {
  Tasks tasks;
  for (int64_t first = 0; first < count; first += size) {
    tasks.push_back(static_cast<double>(std::min(size, count - first)));
  }
  return tasks;
}

FieldParams params(int64_t batch, int64_t count, int64_t dim, int64_t num_threads) {
  FieldParams p{};
  p.batch = batch;
  p.count = count;
  p.dim = dim;
  // As many as have work that is worth waking up for (backends/cpu.py).
  p.num_threads =
      static_cast<int>(std::clamp(batch * count * (dim + 8) >> 20, int64_t{1}, num_threads));
  return p;
}

void run(int64_t batch, int64_t threads) {
  asked = threads;
  Tiles tiles;
  for (int64_t b = 0; b < batch; ++b) tiles.rows.push_back(b);
  const auto size = [&](int64_t tile) { return tiles.size(tile); };
  for (const int64_t dim : {3, 12}) {
    const FieldParams p = params(batch, 12000, dim, threads);
    print(dim == 3 ? "direct-3" : "direct-12", p, direct_shares(p), size);
  }
  const FieldParams few = params(batch, 20000, 40, threads);
  print("fused-40", few, fused_shares(few, tiles), size);
  print("exact-40", few, exact_shares(few, batch), size);
  print("references-40", few,
        blocks(few.count, even_block(few.num_threads, few.count, RowBlock::rows(40))));
  for (const int64_t dim : {784, 3072}) {
    const FieldParams p = params(batch, dim == 784 ? 10000 : 25000, dim, threads);
    const char* names[2][3] = {{"products-784", "weights-784", "sums-784"},
                               {"products-3072", "weights-3072", "sums-3072"}};
    const auto& name = names[dim == 3072];
    print(name[0], p, blocks(p.count, even_block(p.num_threads, p.count, kScreenRows)));
    const int64_t rows = gather_rows(p);
    Tasks weights;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      for (const double block : blocks(p.count, rows)) {
        weights.push_back(block * static_cast<double>(tiles.width(tile)));
      }
    }
    print(name[1], p, weights);
    const Strips strips(p.num_threads, dim, kGatherStrip);
    const int64_t num_blocks = (p.count + rows - 1) / rows;
    Tasks sums;
    for (int64_t part = 0; part < strips.parts; ++part) {
      const int64_t first = num_blocks * part / strips.parts * rows;
      const int64_t last = num_blocks * (part + 1) / strips.parts * rows;
      for (int64_t strip = 0; strip < strips.columns; ++strip) {
        const int64_t columns = dim * (strip + 1) / strips.columns - dim * strip / strips.columns;
        sums.push_back(static_cast<double>(columns * (std::min(p.count, last) - first)));
      }
    }
    print(name[2], p, sums);
  }
}

}  // namespace
}  // namespace pfgm

int main() {
  for (const int64_t threads : {1, 2, 4, 8, 16, 64}) {
    for (const int64_t batch : {1, 2, 7, 16, 40, 64, 65, 128, 200, 300, 512, 700, 1000, 1024}) {
      pfgm::run(batch, threads);
    }
  }
}
