# SPDX-License-Identifier: Apache-2.0
"""The reader that a server copies: no dependency, forty lines, the same numbers as ours, and in the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calib.schema
from calib.scales import choose_scales, save_scales
from calib.schema.reader import read_scales

SOURCE = Path(calib.schema.__file__).with_name("reader.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    from tests.scales.conftest import Lab

    lab = Lab()
    x = lab.values("normal", 2 * 16 * 8).reshape(2, 16, 8)
    return save_scales(
        choose_scales(lab.measurement(lab.site("fc:input", x), lab.weight("fc", x[0])), symmetric=False), tmp_path
    )


def test_it_runs_without_any_package(path: Path) -> None:
    assert len(SOURCE.read_text().splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SOURCE), str(path)], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["fc:input", "fc:weight"]


def test_it_reads_what_the_file_holds(path: Path) -> None:
    tensors = json.loads(path.read_text())["tensors"]
    found = read_scales(path)
    assert found["fc:input"] == (tensors["fc:input"]["scale"], tensors["fc:input"]["zero_point"])
    assert len(found["fc:weight"][0]) == 16


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_it_refuses_what_is_no_scale(value: float, path: Path) -> None:
    content: dict[str, Any] = json.loads(path.read_text())
    content["tensors"]["fc:input"]["scale"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no usable scale"):
        read_scales(path)
    path.write_text(json.dumps({**content, "version": "2.0"}))
    with pytest.raises(ValueError, match="no scale file"):
        read_scales(path)


def test_the_documentation_shows_it_and_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert f"```python\n{SOURCE.read_text()}```" in page
    from calib.export import FORMATS

    rows = {line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(FORMATS)
    for name, found in FORMATS.items():
        assert all(variant in rows[name] for variant in found.variants)
