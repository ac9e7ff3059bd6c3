# SPDX-License-Identifier: Apache-2.0
"""The empirical Poisson field of a whole data set: exact, fused and differentiable."""

import torch  # noqa: F401  (first, so that the extension shares torch's OpenMP runtime)

from pfgm_kernels.choice import report
from pfgm_kernels.density import divergence, log_density
from pfgm_kernels.field import poisson_displacement, poisson_field, posterior_mean
from pfgm_kernels.merge import merge
from pfgm_kernels.references import ReferenceSet

__all__ = [
    "ReferenceSet",
    "divergence",
    "log_density",
    "merge",
    "poisson_displacement",
    "poisson_field",
    "posterior_mean",
    "report",
]
