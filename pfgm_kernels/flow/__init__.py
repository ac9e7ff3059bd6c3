# SPDX-License-Identifier: Apache-2.0
"""The flow around the op: training queries, prior, losses and the sampling ODE."""

from pfgm_kernels.flow.loss import FieldLoss, UnnormalizedLoss
from pfgm_kernels.flow.matching import two_plate_field
from pfgm_kernels.flow.ode import Substitution, Trajectory, encode, sample
from pfgm_kernels.flow.perturb import perturb
from pfgm_kernels.flow.presets import PRESETS, Preset
from pfgm_kernels.flow.prior import log_prior, sample_prior

__all__ = [
    "PRESETS",
    "FieldLoss",
    "Preset",
    "Substitution",
    "Trajectory",
    "UnnormalizedLoss",
    "encode",
    "log_prior",
    "perturb",
    "sample",
    "sample_prior",
    "two_plate_field",
]
