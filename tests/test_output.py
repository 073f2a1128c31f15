# SPDX-License-Identifier: Apache-2.0
"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from calib.errors import ArtifactError, UsageError
from calib.output import output_folder


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), output_folder(out) as work:  # noqa: PT012 - the failing write comes second
        (work / "a").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UsageError), output_folder(out):
        pass
    with output_folder(out, overwrite=True) as work:
        (work / "new").touch()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="disk is full"), output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
