# SPDX-License-Identifier: Apache-2.0
"""Consumers in environments of their own, `make test-consumers`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.export import export_scales
from calib.export.onnx_emulate import token_feed
from calib.export.onnx_lint import session
from calib.export.read_aimet import read_aimet
from calib.export.read_onnx import QdqGraph
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
def test_aimet_simulates_what_the_encodings_say(version: str, symmetric: bool, bert: Lab, tmp_path: Path) -> None:
    python = python_of("aimet")
    scales = bert.scales(symmetric=symmetric)
    export_scales(scales, tmp_path / "aimet", bert.opened, to=f"aimet:{version}")
    feed = token_feed(QdqGraph(onnx.load(tmp_path / "aimet" / "model.onnx")), tmp_path)
    np.savez(tmp_path / "feed.npz", **feed)
    script = ROOT / "benchmarks" / "consumers" / "aimet_run.py"
    command = [python, str(script), str(tmp_path / "aimet"), str(tmp_path / "feed.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    assert set(found["enabled"]) == set(read_aimet(tmp_path / "aimet" / "model.encodings"))
    ours = session(rounded(tmp_path / "aimet"), plain=True).run(None, feed)[0]
    plain = session(tmp_path / "aimet" / "model.onnx").run(None, feed)[0]
    assert np.abs(found["output"] - ours).max() < 0.01 * np.abs(ours).max()
    assert np.abs(found["output"] - plain).max() > 0


def rounded(folder: Path) -> bytes:
    """The float graph with every tensor that has an encoding rounded for all of its readers, as AIMET does it."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    new = []
    for name, one in read_aimet(folder / "model.encodings").items():
        if one.parameter:
            values = numpy_helper.to_array(constants[name])
            scale = np.array(one.scale, np.float32)
            codes = np.clip(np.rint(values / scale), -128, 127)
            constants[name].CopyFrom(numpy_helper.from_array((codes * scale).astype(np.float32), name))
            continue
        for node in graph.node:
            for place, taken in enumerate(node.input):
                if taken == name:
                    node.input[place] = f"{name}/rounded"
        grid = [f"{name}/scale", f"{name}/point"]
        values = (np.array(one.scale[0], np.float32), np.array(one.zero_point, np.int8))
        graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(values, grid, strict=True))
        new.append((name, [
            helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/codes"]),
            helper.make_node("DequantizeLinear", [f"{name}/codes", *grid], [f"{name}/rounded"]),
        ]))  # fmt: skip
    nodes = []
    after = dict(new)
    for node in graph.node:
        nodes.append(node)
        for output in node.output:
            nodes += after.get(output, [])
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())
