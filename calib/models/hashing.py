# SPDX-License-Identifier: Apache-2.0
"""sha256 of files, the identity of everything that calib reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["sha256_of_file"]


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
