# SPDX-License-Identifier: Apache-2.0
"""`TrainingLog`: the epochs of all trainings of a run as CSV, and for TensorBoard on request."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calib.distill.distillation import EpochRecord
from calib.errors import ArtifactError, UsageError

__all__ = ["EVENTS", "FILE", "LoggedEpoch", "TrainingLog", "read_log"]

FILE = "log.csv"
EVENTS = "tensorboard"


@dataclass(frozen=True)
class LoggedEpoch:
    """One row: the training it belongs to, and what its epoch came to."""

    training: str
    epoch: int
    steps: int
    loss: float
    learning_rate: float
    peak_term: float | None = None
    cmi: float | None = None


class TrainingLog:
    """Writes `log.csv` anew after each epoch, so that a kill never leaves half a row.

    A training that goes on after a kill repeats epochs; each is kept once.

    Args:
        folder: where the file is, or will be.
        tensorboard: also write event files below `tensorboard`.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
        ArtifactError: a file from before is damaged.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self._path = folder / FILE
        self._rows = {(row.training, row.epoch): row for row in read_log(self._path)} if self._path.exists() else {}
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError(
                    "tensorboard: is not installed; pip install 'calib[tensorboard]' or set tensorboard: false"
                ) from error
            self._events = SummaryWriter(str(folder / EVENTS))

    def __call__(self, training: str, record: EpochRecord) -> None:
        """Adds an epoch."""
        row = LoggedEpoch(training, **asdict(record))
        self._rows[training, row.epoch] = row
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(LoggedEpoch.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self._rows.values())
        beside = self._path.with_name(f"{self._path.name}.writing")
        beside.write_text(text.getvalue(), encoding="utf-8")
        beside.replace(self._path)
        if self._events is not None:
            for key in ("loss", "learning_rate", "peak_term", "cmi"):
                value = getattr(row, key)
                if value is not None:
                    self._events.add_scalar(f"{training}/{key}", value, row.steps)
            self._events.flush()

    def close(self) -> None:
        """Ends the event files."""
        if self._events is not None:
            self._events.close()


def read_log(path: Path) -> list[LoggedEpoch]:
    """The rows of a `log.csv`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                LoggedEpoch(
                    training=row["training"],
                    epoch=int(row["epoch"]),
                    steps=int(row["steps"]),
                    loss=float(row["loss"]),
                    learning_rate=float(row["learning_rate"]),
                    peak_term=float(row["peak_term"]) if row["peak_term"] else None,
                    cmi=float(row["cmi"]) if row.get("cmi") else None,
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is no log of trainings ({error}); run calib distill run again") from error
