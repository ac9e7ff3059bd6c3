// SPDX-License-Identifier: Apache-2.0
// float queries of more than kMaxDirectDim columns. Products on tensor cores give all distances to
// a known error; few references of a query are then taken by direct differences in double, the
// others by a second product (route.cu).
//
// The gradients, with cotangents g of the displacement v and g_m of the log mass:
//
//     a_j = g·(x0_j − x − v),  c_j = (k/2) w_j (a_j + g_m)/s_j   (Gaussian: w_j (a_j + g_m)/(2t²))
//     dx = −g − 2 Σ_j c_j (x − x0_j),  dt = −2t Σ_j c_j          (Gaussian: (2/t) Σ_j c_j s_j)
//
// Weights are recomputed from s and log w of the anchor.
#include "two_pass.cuh"

namespace pfgm {
namespace {

void check_operands(const FieldParams& p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.parts) % 16 == 0 && p.plane % kChunk == 0;
  if (!aligned)
    throw std::invalid_argument("CUDA kernel called with parts not aligned to 16 bytes");
  if (p.num_parts > kMaxParts || (p.num_parts > 1 && p.plane < p.count * width_of(p.dim))) {
    throw std::invalid_argument("CUDA kernel called with sizes out of range");
  }
}

// Sums over references that a product is split into, so that it fills the chip, but that their
// memory stays within 16 bytes a pair.
int splits_for(const TwoPassArguments& a) {
  const int64_t blocks = divide_up(a.p.batch, kTile) * divide_up(a.width, kTile);
  const int64_t wanted = divide_up(2 * multiprocessors(a.p), blocks);
  const int64_t most = 4 * a.p.count / a.width;
  return static_cast<int>(most < 1 ? 1 : wanted < most ? wanted : most);
}

TwoPassArguments arrange(const FieldParams& p, Workspace& workspace, bool backward) {
  check_operands(p);
  TwoPassArguments a{};
  a.p = p;
  a.backward = backward;
  a.width = width_of(p.dim);
  a.pitch = pitch(p.count);
  a.tiles = divide_up(p.count, kTile);
  a.groups = divide_up(p.count, kGroup);
  a.num_parts = p.num_parts > 1 ? p.num_parts : p.dim <= kMaxThreePartDim ? 3 : 2;
  a.splits = splits_for(a);
  const int64_t batch = p.batch, blocks = divide_up(batch, kTile);
  a.queries = workspace.take<uint16_t>(a.num_parts * batch * a.width);
  a.squares = workspace.take<double>(batch);
  a.shared = workspace.take<double>(batch);
  a.r = workspace.take<float>(batch * a.pitch);
  a.minima = workspace.take<float>(batch * a.tiles);
  a.left = Left(p, workspace);
  a.cut = workspace.take<float>(batch);
  a.base = workspace.take<double>(batch);
  a.scales = workspace.take<float>(4 * batch);
  if (backward) {
    a.cotangents = workspace.take<uint16_t>(a.num_parts * batch * a.width);
    a.cotangent_squares = workspace.take<double>(batch);
    a.constant = workspace.take<double>(batch);
    a.pull = workspace.take<float>(batch * a.pitch);
  }
  a.weights = workspace.take<uint16_t>(2 * batch * a.stride());
  a.active = workspace.take<uint8_t>(batch * a.groups);
  a.sums = workspace.take<double>(2 * batch * a.groups);
  a.list = workspace.take<int>(blocks * a.list_stride());
  a.length = workspace.take<int>(blocks);
  a.rest = workspace.take<double>(batch);
  a.moment = workspace.take<double>(batch);
  a.products = workspace.take<float>(a.splits * batch * a.width);
  a.total = workspace.take<double>(batch);
  return a;
}

// Rows (B, d) of queries or cotangents as parts.
void split_rows(const TwoPassArguments& a, RowsOf of, uint16_t* parts, double* squares,
                double* marks) {
  const int64_t plane = a.p.batch * a.width;
  split({a.p, of, a.left, a.p.batch, a.num_parts, parts, plane, squares, marks});
}

// r of all references, and what it decides.
void screen(const TwoPassArguments& a) {
  split_rows(a, RowsOf::kQueries, a.queries, a.squares, a.shared);
  compare({a.p, a.num_parts, a.queries, a.width, a.pitch, a.r, a.minima, nullptr});
  route(a);
}

}  // namespace

void two_pass_forward(const FieldParams& p, Workspace& workspace) {
  const TwoPassArguments a = arrange(p, workspace, false);
  screen(a);
  weigh(a);
  weighted_sum(a);
  exact_forward(p, workspace, a.left, {a.r, a.base, a.rest}, a.total);
  combine(a);
}

void two_pass_backward(const FieldParams& p, Workspace& workspace) {
  const TwoPassArguments a = arrange(p, workspace, true);
  screen(a);
  split_rows(a, RowsOf::kCotangents, a.cotangents, a.cotangent_squares, a.constant);
  compare({p, a.num_parts, a.cotangents, a.width, a.pitch, a.pull, a.minima, a.cut});
  weigh(a);
  weighted_sum(a);
  exact_backward(p, workspace, a.left, a.r);
  combine(a);
}

}  // namespace pfgm
