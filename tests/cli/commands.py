# SPDX-License-Identifier: Apache-2.0
"""The command line, called as its entry point is."""

from __future__ import annotations

import pytest

from calib.cli import main

SMALL = ["--samples", "8", "--max-length", "32", "--batch-size", "4", "-d", "builtin:speeches"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:  # noqa: PT012 - a command that returns has succeeded
        main([str(a) for a in arguments])
        raise SystemExit(0)
    return int(stop.value.code or 0)


def one_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.startswith("calib:")]
    assert len(lines) == 1, text
    return lines[0]
