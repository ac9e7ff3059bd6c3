# SPDX-License-Identifier: Apache-2.0
"""The flow around the op: queries and prior, losses, denoisers and the sampling ODE."""

from pfgm_kernels.flow.churn import Churn
from pfgm_kernels.flow.constants import PRESETS, Constants, constants
from pfgm_kernels.flow.coordinates import query_of_flow_matching, query_of_vp
from pfgm_kernels.flow.denoise import Preconditioned, as_denoiser, as_field, field_of_pfgm
from pfgm_kernels.flow.grid import grid
from pfgm_kernels.flow.latents import interpolate, rescale
from pfgm_kernels.flow.likelihood import Likelihood, bits_per_dim, log_likelihood
from pfgm_kernels.flow.loss import FieldLoss, PosteriorMeanLoss, UnnormalizedLoss
from pfgm_kernels.flow.matching import two_plate_field
from pfgm_kernels.flow.ode import Trajectory, encode, sample
from pfgm_kernels.flow.perturb import heights, perturb, perturb_at
from pfgm_kernels.flow.prior import log_prior, sample_prior
from pfgm_kernels.flow.substitution import Substitution

__all__ = [
    "PRESETS",
    "Churn",
    "Constants",
    "FieldLoss",
    "Likelihood",
    "PosteriorMeanLoss",
    "Preconditioned",
    "Substitution",
    "Trajectory",
    "UnnormalizedLoss",
    "as_denoiser",
    "as_field",
    "bits_per_dim",
    "constants",
    "encode",
    "field_of_pfgm",
    "grid",
    "heights",
    "interpolate",
    "log_likelihood",
    "log_prior",
    "perturb",
    "perturb_at",
    "query_of_flow_matching",
    "query_of_vp",
    "rescale",
    "sample",
    "sample_prior",
    "two_plate_field",
]
