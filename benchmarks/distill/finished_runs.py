# SPDX-License-Identifier: Apache-2.0
"""Runs that are done, kept outside the repository as JSON lines, so that a benchmark goes on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FinishedRuns:
    """Rows by a key that holds everything that could change them."""

    def __init__(self, name: str) -> None:
        root = Path(os.environ.get("CALIB_CACHE") or Path.home() / ".cache" / "calib") / "benchmarks"
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / f"{name}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: dict[str, Any] = {}
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                continue
            self.rows[record["key"]] = record["row"]

    def knows(self, key: dict[str, Any]) -> bool:
        """Whether the row of a key is there."""
        return json.dumps(key, sort_keys=True) in self.rows

    def of(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, run now if it is not there."""
        text = json.dumps(key, sort_keys=True)
        if text not in self.rows:
            row = run()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": text, "row": row}) + "\n")
            self.rows[text] = row
        return self.rows[text]
