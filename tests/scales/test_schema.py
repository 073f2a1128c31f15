# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import calib.schema.scales
from calib.scales import json_schema


def test_the_published_schema_is_the_one_in_force() -> None:
    published = Path(calib.schema.scales.__file__).with_name("scales.schema.json")
    assert json.loads(published.read_text(encoding="utf-8")) == json_schema()
