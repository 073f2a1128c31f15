# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.cures.models import MODELS


@pytest.fixture(params=sorted(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """Name of each of `MODELS` in turn."""
    return str(request.param)
