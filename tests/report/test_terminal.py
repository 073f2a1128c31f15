# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from calib.report.progress import progress
from calib.report.terminal import sparkline


def test_sparkline_follows_the_logarithm() -> None:
    assert sparkline([1, 10, 100]) == "▁▅█" or sparkline([1, 10, 100]) == "▁▄█"
    assert len(sparkline([5.0] * 4)) == 4


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report(5, 10)
        report(10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("measured 10 of 10 tokens")


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as report:
        report(10, 10)
    assert capsys.readouterr().err == ""
