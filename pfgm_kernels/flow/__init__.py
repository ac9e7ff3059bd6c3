# SPDX-License-Identifier: Apache-2.0
"""The flow around the op: queries and prior, losses, denoisers and the sampling ODE."""

from pfgm_kernels.flow.constants import PRESETS, Constants, constants
from pfgm_kernels.flow.coordinates import query_of_flow_matching, query_of_vp
from pfgm_kernels.flow.denoise import Preconditioned, as_denoiser, as_field, field_of_pfgm
from pfgm_kernels.flow.loss import FieldLoss, PosteriorMeanLoss, UnnormalizedLoss
from pfgm_kernels.flow.ode import Substitution, Trajectory, encode, sample
from pfgm_kernels.flow.perturb import heights, perturb, perturb_at
from pfgm_kernels.flow.prior import log_prior, sample_prior

__all__ = [
    "PRESETS",
    "Constants",
    "FieldLoss",
    "PosteriorMeanLoss",
    "Preconditioned",
    "Substitution",
    "Trajectory",
    "UnnormalizedLoss",
    "as_denoiser",
    "as_field",
    "constants",
    "encode",
    "field_of_pfgm",
    "heights",
    "log_prior",
    "perturb",
    "perturb_at",
    "query_of_flow_matching",
    "query_of_vp",
    "sample",
    "sample_prior",
]
