# SPDX-License-Identifier: Apache-2.0
"""A model that compares texts with pictures runs on neither alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import media_models
from tests.cli.commands import one_line, run


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media_models.clip(tmp_path_factory.mktemp("models") / "clip")


def test_sites_of_both_towers_are_reached(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sites", clip, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_reached"] == []
    assert {site["name"].partition(".")[0] for site in found["sites"]} >= {"text_model", "vision_model"}


def test_on_text_alone_it_is_said_what_is_missing(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", clip, "-d", "builtin:speeches", "--max-length", "16", "-o", tmp_path / "m", "-q") == 1
    assert "that -d has all that it needs: it takes more than text" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "m").exists()
