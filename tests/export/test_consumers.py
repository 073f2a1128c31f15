# SPDX-License-Identifier: Apache-2.0
"""Consumers in environments of their own, `make test-consumers`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from calib.export import export_scales
from calib.export.onnx_emulate import token_feed
from calib.export.onnx_lint import session
from calib.export.read_aimet import read_aimet
from calib.export.read_onnx import read_onnx
from tests.export.conftest import Lab

ROOT = Path(__file__).parents[2]


def python_of(name: str) -> str:
    path = ROOT / ".consumers" / name / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no environment of {name}; run `make consumer-{name}`")
    return str(path)


@pytest.mark.consumer
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_aimet_simulates_what_the_graph_in_integers_computes(
    version: str, symmetric: bool, bert: Lab, tmp_path: Path
) -> None:
    python = python_of("aimet")
    scales = bert.scales(symmetric=symmetric)
    export_scales(scales, tmp_path / "aimet", bert.opened, to=f"aimet:{version}")
    export_scales(scales, tmp_path / "onnx", bert.opened, to="onnx-qdq")
    feed = token_feed(read_onnx(tmp_path / "onnx" / "model.onnx"), tmp_path / "onnx")
    np.savez(tmp_path / "feed.npz", **feed)
    script = ROOT / "benchmarks" / "consumers" / "aimet_run.py"
    command = [python, str(script), str(tmp_path / "aimet"), str(tmp_path / "feed.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    assert set(found["enabled"]) == set(read_aimet(tmp_path / "aimet" / "model.encodings"))
    ours = session(tmp_path / "onnx" / "model.onnx").run(None, feed)[0]
    assert np.abs(found["output"] - ours).max() < 0.01 * np.abs(ours).max()
