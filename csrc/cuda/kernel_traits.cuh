// SPDX-License-Identifier: Apache-2.0
// Sizes of the matrix products on tensor cores, each beside the arithmetic that it must satisfy.
//
// No CUTLASS: its types would have to be emulated as well where there is no GPU, and two products,
// of one shape and with promotion of their own, take fewer lines here than their configuration
// there.
#pragma once

#include <cstdint>

#include "warp.cuh"

namespace pfgm {
namespace {

constexpr int kThreads = 256;  // of every kernel of the two passes
constexpr int kWarps = kThreads / kWarp;

// A block computes a kTile × kTile tile of a product, its warps kWarpM × kWarpN each, from
// operands that pass through shared memory kBlockK terms at a time.
constexpr int kTile = 128;
constexpr int kWarpM = 64;
constexpr int kWarpN = 32;
constexpr int kBlockK = 32;
constexpr int kWarpsN = kTile / kWarpN;
static_assert(kTile / kWarpM * kWarpsN == kWarps, "the warps cover the tile once");

// mma.sync: 16 × 8 sums of 16 products.
constexpr int kMmaM = 16;
constexpr int kMmaN = 8;
constexpr int kMmaK = 16;
constexpr int kFragmentsM = kWarpM / kMmaM;
constexpr int kFragmentsN = kWarpN / kMmaN;
constexpr int kFragmentsK = kBlockK / kMmaK;
static_assert(kFragmentsN % 2 == 0, "load_matrices fetches two fragments of b at once");

// Tensor cores align what they add at a time, the products of 8 columns (from sm_90 on 16) and a
// sum, to the largest exponent among them and cut each toward zero, as far behind its point as a
// float reaches or one bit further, from sm_90 on two. They cut the sum to a float. Of g columns
// that loses at most (g + 2) units in the last place of Σ|a b|, g ≥ 8: kCut for each column.
//
// So much is lost where one product outweighs all others and these have one sign. Where columns are
// alike, few products are cut: they have 16 digits. But the sum is, each time: of kMaxPromotion
// columns it loses kCut of itself on average. So kBlockK columns are summed from zero.
constexpr int kMaxPromotion = 128;
constexpr double kCut = 1.25 * 0x1p-23;
static_assert(kBlockK <= kMaxPromotion);

// Rows of operands are padded with zeros to a multiple of this, which also aligns them.
constexpr int kWidthMultiple = 64;
static_assert(kWidthMultiple % kBlockK == 0, "no tile of columns is cut short");
static_assert(kTile % kWidthMultiple == 0);

// Shared memory moves in chunks of 16 bytes.
constexpr int kChunk = 8;                        // bfloat16 elements
constexpr int kPartBytes = kTile * kBlockK * 2;  // one part of one operand
constexpr int kPartChunks = kTile * kBlockK / kChunk;
static_assert(kPartChunks % kThreads == 0, "every thread copies the same number of chunks");

// What a block may have on every chip from sm_80 to sm_120 (99 KiB), less 1 KiB.
constexpr int kMaxSharedBytes = 98 << 10;

template <int kAParts, int kBParts>
struct ProductTraits {
  static constexpr int kStageBytes = (kAParts + kBParts) * kPartBytes;
  static constexpr int kMostStages = kMaxSharedBytes / kStageBytes;
  static constexpr int kStages = kMostStages < 4 ? kMostStages : 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kStages >= 2, "one stage is filled while another is read");
  // The epilogue of the distances keeps a smallest value of each row and column of warps there.
  static_assert(kSharedBytes >= static_cast<int>(kTile * kWarpsN * sizeof(float)));
};

constexpr int kMaxParts = 3;

// Queries of up to this dimension take three parts, as precise as float: in low dimensions two
// would seldom be certain to do.
constexpr int kMaxThreePartDim = 128;

// References are weighed by groups: one warp each, kBlockK references at a time, which is also
// what the weighted sum skips or takes. Sums of up to 256 terms may be in float.
constexpr int kGroup = 256;
static_assert(kBlockK == kWarp, "a lane weighs one reference of a tile");
static_assert(kGroup / kBlockK == 8, "a byte says which tiles of a group have weights");
static_assert(kGroup % kTile == 0);

}  // namespace
}  // namespace pfgm
