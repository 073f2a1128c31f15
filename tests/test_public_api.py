# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import pytest

import calib


def test_every_public_name_is_there() -> None:
    for name in calib.__all__:
        assert getattr(calib, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = calib.nothing_like_this


def test_importing_calib_imports_nothing_heavy() -> None:
    heavy = "import sys, calib; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
