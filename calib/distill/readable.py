# SPDX-License-Identifier: Apache-2.0
"""`readable`: what is wrong with the files of a classifier, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from calib.errors import ArtifactError

__all__ = ["readable"]


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Within the block an error of reading the files of a folder names the folder, the reason and the next step.

    Raises:
        ArtifactError: a file is missing, damaged, or of another version.
    """
    try:
        yield
    except (OSError, ValueError, ValidationError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{folder}: no usable classifier ({reason}); write it again with calib distill run"
        ) from error
