# SPDX-License-Identifier: Apache-2.0
"""How precise products of three bfloat16 parts are, and which sums they are precise enough for."""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.products import CUT

# Products may move a logit by ε at most, if all of their roundings added up. So they do to all of
# the result by ε times the share of what is not listed, which may be LOGIT_BOUND. In fact they
# hardly add up, and less the more references share the weight: one that has much of it is listed.
LOGIT_BOUND = tl.constexpr(4e-5)
HEAVY = tl.constexpr(1 / 32)  # share of the weight that may be left to a product at that bound
MOST = tl.constexpr(0.25)  # … at any
MOST_OFF = tl.constexpr(0.25)  # a logit
COMMON_OFF = tl.constexpr(8e-7)  # the logits of references that are not listed, all alike


@triton.jit
def error_of_r(header_ptr, squared):
    """How far r may be off at most where columns are alike, so that tensor cores cut few products:
    twice as far as float32 rounds. Where one outweighs the others it may be 64 times CUT, not three
    roundings, of length · radius.
    """
    deviation, radius = tl.load(header_ptr + 1), tl.load(header_ptr + 3)
    length, centre = tl.sqrt(squared), tl.load(header_ptr + 4)
    spread = tl.maximum(centre, radius * radius - centre)
    error = 5.960464477539063e-08 * (6 * length * radius + 2 * spread)
    return error + 2 * deviation * (length + radius)


@triton.jit
def largest_share(error):
    """Of the weight: what a reference may have unlisted where logits are off by error."""
    ratio = (0 * error + LOGIT_BOUND) / error
    return tl.minimum(tl.maximum(ratio * ratio, 1) * HEAVY, MOST)


@triton.jit
def precise_enough(error, light, total, anchor_logit, products):
    """Whether a sum of weights is, of which `light` is not listed. anchor_logit is how far that of
    the nearest reference is off, which also shows whether `error` holds; products is Σ w x'·y over
    what is not listed, as logits.

    What is listed is exact: an error of all others counts by their share. But an anchor that is not
    listed stands for others like it. It may be right by chance, while all others are not: tensor
    cores cut toward zero (products.py).
    """
    alike = tl.abs(anchor_logit) * tl.where(total * largest_share(error) <= 1, light, total)
    alike = tl.maximum(alike, 2 * CUT * tl.abs(products))
    fine = (error * light <= total * LOGIT_BOUND) & (tl.abs(anchor_logit) <= MOST_OFF)
    return fine & (alike <= COMMON_OFF * total)
