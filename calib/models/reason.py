# SPDX-License-Identifier: Apache-2.0
"""The reason inside another library's exception, short enough for calib's one-line errors."""

from __future__ import annotations

__all__ = ["reason"]


def reason(error: BaseException, limit: int = 300) -> str:
    """First line of an exception's text, or its class name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
