# SPDX-License-Identifier: Apache-2.0
"""Keep transformers, and what it imports, from writing while calib loads with it, and put its switches back."""

from __future__ import annotations

import logging as standard
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_transformers"]

_IMPORTED = ("torchao", "torch.utils._pytree")
"""Loggers that warn when transformers imports torchao: of kernels for other machines, and of a deprecation."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, and those of its imports, inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    imported = {name: standard.getLogger(name) for name in _IMPORTED}
    levels = {name: logger.level for name, logger in imported.items()}
    for logger in imported.values():
        logger.setLevel(standard.ERROR)
    try:
        yield
    finally:
        for name, logger in imported.items():
            logger.setLevel(levels[name])
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
