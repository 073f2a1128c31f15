# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import SMALL, run


@pytest.fixture(scope="module")
def measured(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "measured"
    assert run("measure", tiny_llama, "-o", folder, *SMALL, "-q") == 0
    return folder
