# SPDX-License-Identifier: Apache-2.0
"""The flow around the op: training queries, prior, losses and the sampling ODE."""

from pfgm_kernels.flow.churn import Churn
from pfgm_kernels.flow.grid import grid
from pfgm_kernels.flow.latents import interpolate, rescale
from pfgm_kernels.flow.likelihood import Likelihood, bits_per_dim, log_likelihood
from pfgm_kernels.flow.loss import FieldLoss, UnnormalizedLoss
from pfgm_kernels.flow.ode import Trajectory, encode, sample
from pfgm_kernels.flow.perturb import perturb
from pfgm_kernels.flow.presets import PRESETS, Preset
from pfgm_kernels.flow.prior import log_prior, sample_prior
from pfgm_kernels.flow.substitution import Substitution

__all__ = [
    "PRESETS",
    "Churn",
    "FieldLoss",
    "Likelihood",
    "Preset",
    "Substitution",
    "Trajectory",
    "UnnormalizedLoss",
    "bits_per_dim",
    "encode",
    "grid",
    "interpolate",
    "log_likelihood",
    "log_prior",
    "perturb",
    "rescale",
    "sample",
    "sample_prior",
]
