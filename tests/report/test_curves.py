# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import pytest

from calib.distill.distillation import EpochRecord
from calib.distill.training_log import FILE, LoggedEpoch, TrainingLog, read_log
from calib.errors import ArtifactError, UsageError
from calib.report.curves import draw_curves


def rows(kinds: int) -> list[LoggedEpoch]:
    return [
        LoggedEpoch(f"seed {seed}, student by {kind}", epoch, 20 * epoch, (2 + kind) * math.exp(-epoch / 5) + 0.1, 0.1)
        for kind in range(kinds)
        for seed in range(2)
        for epoch in range(1, 9)
    ]


def test_curves_of_one_kind_share_a_colour_and_lie_where_their_loss_says(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert draw_curves(rows(1), tmp_path / "curves.png") == []
    picture = image.open(tmp_path / "curves.png").convert("RGB")
    blue = [
        (x, y)
        for x in range(100, picture.width)
        for y in range(picture.height - 70)
        if picture.getpixel((x, y))[2] > 150 and picture.getpixel((x, y))[0] < 60
    ]
    assert blue
    left, right = min(blue), max(blue)
    assert right[1] - left[1] > 200  # the loss falls, downwards in the picture
    assert right[0] - left[0] > 700


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    assert draw_curves(rows(16), tmp_path / "curves.png") == ["student by 14", "student by 15"]
    with pytest.raises(UsageError, match="no positive loss"):
        draw_curves([], tmp_path / "none.png")


def test_a_log_keeps_each_epoch_once_and_survives_a_restart(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    log("a", EpochRecord(1, 10, 0.1 + 0.2, 0.5))
    log("a", EpochRecord(2, 20, 0.25, 0.5, 3.0))
    again = TrainingLog(tmp_path)
    again("a", EpochRecord(2, 20, 0.125, 0.5, 3.0))
    assert read_log(tmp_path / FILE) == [
        LoggedEpoch("a", 1, 10, 0.1 + 0.2, 0.5),
        LoggedEpoch("a", 2, 20, 0.125, 0.5, 3.0),
    ]
    (tmp_path / FILE).write_text("training,epoch\na,x\n")
    with pytest.raises(ArtifactError, match="no log"):
        TrainingLog(tmp_path)


def test_tensorboard_is_written_or_its_absence_said(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"calib\[tensorboard\]"):
            TrainingLog(tmp_path, tensorboard=True)
        return
    log = TrainingLog(tmp_path, tensorboard=True)
    log("a", EpochRecord(1, 10, 0.5, 0.5))
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_second_round_of_colours_is_dashed_however_few_its_points_are(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    flat = [
        LoggedEpoch(f"student by {kind}", epoch, 50 * epoch, 10.0**-kind, 0.1) for kind in range(8) for epoch in (1, 2)
    ]
    draw_curves(flat, tmp_path / "curves.png")
    picture = image.open(tmp_path / "curves.png").convert("RGB")
    lengths = []
    for kind in (1, 7):  # one of the first round, and the last kind, which is of the second
        y = round(_row(kind))
        dark = [picture.getpixel((x, y))[2] < 230 or picture.getpixel((x, y))[0] < 200 for x in range(520, 900)]
        lengths.append(sum(dark))
    assert lengths[0] == 380
    assert 100 < lengths[1] < 300


def _row(kind: int) -> float:
    """Height of the line of a kind whose loss is 10^-kind, of eight, in pixels of the picture."""
    return 410 - 370 * ((7.35 - kind) / 7.7)
