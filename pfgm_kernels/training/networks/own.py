# SPDX-License-Identifier: Apache-2.0
"""The user's own network, named as ``package.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from torch import nn


def make(name: str, event_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The module that the factory called ``name`` returns for (event_shape=, num_classes=).

    The current folder is looked in first. Raises ValueError, saying which step failed.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"network {name}: cannot import {module_name}: {told(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        got = "nothing of that name" if factory is None else type(factory).__name__
        raise ValueError(
            f"network {name} expects a function {attribute} in {module_name}, got {got}"
        )
    try:
        network = factory(event_shape=tuple(event_shape), num_classes=num_classes)
    except Exception as error:
        raise ValueError(
            f"network {name}: {attribute}(event_shape={tuple(event_shape)}, "
            f"num_classes={num_classes}) failed: {told(error)}"
        ) from error
    return check(name, network)


def check(name: str, network: object) -> nn.Module:
    """``network`` if it is a module with something to train; raises ValueError otherwise."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"network {name} expects a torch.nn.Module, got {type(network).__name__}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"network {name} expects parameters to train, got none")
    return network


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
