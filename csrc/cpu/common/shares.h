// SPDX-License-Identifier: Apache-2.0
// How the work of a call is shared out among threads, by what it is and not by tiles. It depends on
// the number of threads alone, and so do the bits of what is summed over it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pfgm {
namespace {

constexpr int64_t kSharesPerThread = 4;  // so that a thread that is held up is waited for less
constexpr int64_t kSlivers = 64;         // what is less of a share than one over this is no piece
constexpr int64_t kEvenBlocks = 20;      // a thread: one more or less does not matter
constexpr int64_t kMinColumns = 48;      // of a strip: less would fetch lines of the cache in vain

// What a task takes of a tile of queries: the references, or blocks of these, from first to last.
struct Piece {
  int64_t tile, first, last;
};

// Tiles of queries, each with all of `count` references, one tile after the other, cut into shares
// of equal work. Most tiles stay whole: there are fewer cuts than shares.
struct Shares {
  std::vector<Piece> pieces;
  std::vector<int64_t> tiles, shares;  // the first piece of each; at the end, how many there are

  // weight(tile): the work of a tile with a reference. least: references that a whole tile had
  // better be together with.
  template <class Weight>
  Shares(int num_threads, int64_t num_tiles, const Weight& weight, int64_t count, int64_t least) {
    int64_t work = 0;  // of everything
    for (int64_t tile = 0; tile < num_tiles; ++tile) work += weight(tile) * count;
    const int64_t spare = num_tiles * count / (num_threads * least);
    const int64_t num_shares =
        num_threads == 1 ? 1 : num_threads * std::clamp<int64_t>(spare, 1, kSharesPerThread);
    int64_t before = 0, tile = 0, first = 0;  // work of the tiles before; what the next piece is
    for (int64_t share = 1; share <= num_shares; ++share) {
      shares.push_back(size());
      const int64_t end = work / num_shares * share + work % num_shares * share / num_shares;
      for (; tile < num_tiles; first = 0, before += weight(tile++) * count) {
        if (static_cast<int64_t>(tiles.size()) == tile) tiles.push_back(size());
        const int64_t sliver = work / num_shares / weight(tile) / kSlivers;
        int64_t last = std::min(count, (end - before) / weight(tile));
        if (count - last <= sliver) last = count;
        if (last - first <= sliver && last < count) last = first;
        if (last > first) pieces.push_back({tile, first, last});
        first = last;
        if (last < count) break;
      }
    }
    shares.push_back(size());
    tiles.push_back(size());
  }

  int64_t size() const { return static_cast<int64_t>(pieces.size()); }
  int64_t count() const { return static_cast<int64_t>(shares.size()) - 1; }

  // Calls task(index of a piece) for those of a share.
  template <class Task>
  void for_pieces(int64_t share, const Task& task) const {
    for (int64_t i = shares[share]; i < shares[share + 1]; ++i) task(i);
  }
};

// The size of blocks of at most so many of `count` items that threads can share evenly.
inline int64_t even_block(int num_threads, int64_t count, int64_t most) {
  const int64_t fewest = (count + most - 1) / most;
  if (num_threads == 1 || fewest >= kEvenBlocks * num_threads) return most;
  const int64_t blocks = (fewest + num_threads - 1) / num_threads * num_threads;
  return (count + blocks - 1) / blocks;
}

// Strips of columns, of so many at most, times parts of the references: two or a multiple of that
// for each thread.
struct Strips {
  int64_t columns, parts;  // how many there are of each

  Strips(int num_threads, int64_t dim, int64_t most) {
    const int64_t tasks = num_threads == 1 ? 1 : 2 * num_threads;
    const int64_t fewest = (dim + most - 1) / most;
    columns = (fewest + tasks - 1) / tasks * tasks;
    while (columns > fewest && columns * kMinColumns > dim) {
      do --columns;
      while (tasks % columns != 0);
    }
    parts = (tasks + columns - 1) / columns;
  }
};

}  // namespace
}  // namespace pfgm
