# SPDX-License-Identifier: Apache-2.0
"""The reference training loop: data sets, a network, checkpoints and the evaluation of samples.

It needs the extra `train`; the op and the flow do not.
"""

from importlib.util import find_spec

_NEEDED = "diffusers matplotlib omegaconf rich safetensors sklearn tensorboard"
for _module in _NEEDED.split():
    if find_spec(_module) is None:
        raise ImportError(
            f"pfgm_kernels.training needs {_module}: "
            "pip install -e '.[train]' in the project's folder"
        )
