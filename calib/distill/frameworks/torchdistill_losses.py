# SPDX-License-Identifier: Apache-2.0
"""Loads torchdistill's losses on first use. They import without torchvision; the rest of that package does not."""

from __future__ import annotations

import importlib
from types import ModuleType

from calib.errors import UsageError

__all__ = ["torchdistill_losses"]


def torchdistill_losses(name: str) -> ModuleType:
    """`torchdistill.losses.mid_level`.

    Args:
        name: the framework that needs it, for the error.

    Raises:
        UsageError: torchdistill is not installed.
    """
    try:
        return importlib.import_module("torchdistill.losses.mid_level")
    except ImportError as error:
        raise UsageError(
            f"framework {name}: its loss is torchdistill's; pip install 'calib[distill]', "
            "or without torchvision: pip install --no-deps torchdistill"
        ) from error
