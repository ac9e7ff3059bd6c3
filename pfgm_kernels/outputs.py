# SPDX-License-Identifier: Apache-2.0
"""What the op makes of the displacement v of a query, and the derivatives of that.

    displacement   v                                      (d columns)
    mean           x + v                                  (d columns)
    field          scale · (v, −t) / (‖(v, −t)‖ + gamma)  (d + 1 columns), Eq. (12)

v (n, d), t (n,) and everything that is derived are float64; the result is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Output(NamedTuple):
    name: str
    gamma: float
    scale: float

    def shape(self, x: Tensor, d: int) -> tuple[int, ...]:
        """Of the result for x (n, *event), d = prod(event)."""
        return (x.shape[0], d + 1) if self.name == "field" else tuple(x.shape)

    def write(self, v: Tensor, x: Tensor, t: Tensor, out: Tensor) -> None:
        """To out, rows of the result, of any floating dtype."""
        if self.name == "field":
            factor = self._factor(_norm(v, t))
            torch.mul(v, factor[:, None], out=out[:, :-1])
            torch.mul(-t, factor, out=out[:, -1])
        elif self.name == "mean":
            torch.add(v, x, out=out)
        else:
            out.copy_(v)

    def pull(self, g: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangent of v (n, d) for that of the result, and what reaches x (n, d) and t (n,)
        not by way of the weights, which v = Σ_j w_j (x0_j − x) and −t do.
        """
        if self.name == "field":
            g_v, g_t = self._normalized(g[:, :-1], g[:, -1], v, t)
            return g_v, -g_v, -g_t
        return g, torch.zeros_like(g) if self.name == "mean" else -g, torch.zeros_like(t)

    def push(
        self, mean_tangent: Tensor, x_tangent: Tensor, t_tangent: Tensor, v: Tensor, t: Tensor
    ) -> Tensor:
        """The tangent of the result for those of x + v (n, d), x (n, d) and t (n,)."""
        if self.name == "mean":
            return mean_tangent
        v_tangent = mean_tangent - x_tangent
        if self.name == "displacement":
            return v_tangent
        columns, last = self._normalized(v_tangent, -t_tangent, v, t)
        return torch.cat([columns, last[:, None]], 1)

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.scale / (norm + self.gamma)).masked_fill_(norm == 0, 0.0)

    def _normalized(self, a: Tensor, b: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of the field by (v, −t) times (a, b). It is symmetric: both modes use it.

        With u = (v, −t)/n, n the norm:  scale/(n + gamma) · ((a, b) − u (u·(a, b)) n/(n + gamma)).
        """
        norm = _norm(v, t)
        factor = self._factor(norm)
        along = ((a * v).sum(1) - b * t) / norm / (norm + self.gamma)
        along.masked_fill_(norm == 0, 0.0)
        return factor[:, None] * (a - v * along[:, None]), factor * (b + t * along)


def _norm(v: Tensor, t: Tensor) -> Tensor:
    return torch.hypot(torch.linalg.vector_norm(v, dim=1), t)
