# SPDX-License-Identifier: Apache-2.0
"""The right-hand side of the sampling ODE, Eq. (4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pfgm_kernels.flow._queries import shaped
from pfgm_kernels.flow.substitution import Substitution

FieldFn = Callable[..., Tensor]

UNCHECKED = 16
"""Evaluations after which the host waits to see that all have been finite."""


REASONS = {
    -1: "",
    0: ": the field is NaN or Inf there",
    1: ": F_t is 0, or nearly there",
}
"""Of a slope that is not finite, by whether the field is."""


class Slope:
    """dx/dt = F_x / F_t of a field, with its evaluations counted and checked.

    x (B, *event): the batch; what is asked about later are its rows, or some of them.
    arguments: for the field. Tensors among them with a first axis of B go by row.
    """

    def __init__(
        self,
        field_fn: FieldFn,
        x: Tensor,
        substitution: Substitution | None,
        arguments: Mapping[str, object],
    ) -> None:
        if not (substitution is None or isinstance(substitution, Substitution)):
            raise TypeError(
                f"substitution expects a Substitution or None, got {type(substitution).__name__}"
            )
        self.field_fn = field_fn
        self.substitution = substitution
        self.count = len(x)
        self.arguments = arguments
        self.nfe = 0
        self.evaluations = torch.zeros(self.count, dtype=torch.int64, device=x.device)
        self._unchecked: list[tuple[str, int, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """dx/dt (b, *event) at states x (b, *event) and t (b,), of the batch's rows (b,) or all."""
        t = t.to(x.dtype)
        field = self.field_fn(x, t, **self.arguments_of(rows))
        self.nfe += 1
        self.evaluations[slice(None) if rows is None else rows] += 1
        flat = x.flatten(1)
        wanted = (flat.shape[0], flat.shape[1] + 1)
        field = shaped("field_fn's output", field, wanted, "(B, d + 1)").to(x.dtype)
        field_x, field_t = field[:, :-1], field[:, -1]
        if self.substitution is not None:
            known = self.substitution.t_component(flat, t, field_x)
            field_t = torch.where(t < self.substitution.below, known, field_t)
        slope = field_x / field_t[:, None]
        self.watch("dx/dt = F_x / F_t", slope, t, field)
        return slope.view(x.shape)

    def arguments_of(self, rows: Tensor | None) -> Mapping[str, object]:
        if rows is None:
            return self.arguments
        return {
            name: value[rows]
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.count
            else value
            for name, value in self.arguments.items()
        }

    def watch(self, what: str, values: Tensor, t: Tensor, field: Tensor | None = None) -> None:
        """Have `check` see whether values (b, ...) at t (b,) are finite, and the field if not."""
        broken = ~torch.isfinite(values.detach()).flatten(1).all(1)
        finite = broken.sum() * 0 - 1 if field is None else torch.isfinite(field.detach()).all()
        note = [broken.sum(), (broken * t).amax(), finite]
        self._unchecked.append((what, len(t), torch.stack([value.double() for value in note])))
        if len(self._unchecked) >= UNCHECKED:
            self.check()

    def check(self) -> None:
        """Raises FloatingPointError if something has not been finite since the last check."""
        if not self._unchecked:
            return
        whats, counts, notes = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        read = torch.stack(notes).tolist()
        for what, count, (broken, t, finite) in zip(whats, counts, read, strict=True):
            if broken:
                raise FloatingPointError(
                    f"{what} is not finite at t = {t:g} for {broken:.0f} of {count} samples"
                    f"{REASONS[finite]}"
                )
