# SPDX-License-Identifier: Apache-2.0
"""The registries of `calib verify`: a check per format, and the consumers that can be run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import UsageError
from calib.export.report import ConsumerReport, Verification
from calib.schema.export import ExportManifest
from calib.schema.scales import ScaleFile

if TYPE_CHECKING:
    from calib.models import OpenedModel

__all__ = ["CHECKS", "CONSUMERS", "Check", "Consumer", "checks", "consumer", "consumer_of"]

Check = Callable[[Path, ExportManifest | None, ScaleFile | None], Verification]
Run = Callable[[Path, ExportManifest | None, "OpenedModel | None"], ConsumerReport]

CHECKS: dict[str, Check] = {}
"""Format -> what looks at its files, without a consumer."""


@dataclass(frozen=True)
class Consumer:
    """A program that reads exports and that calib can run.

    Attributes:
        name: as `--consumer` takes it.
        formats: that it reads; the first consumer of a format is its default.
        packages: that must be installed.
        install: the command that does that.
        run: loads a folder and compares.
    """

    name: str
    formats: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    run: Run

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


CONSUMERS: dict[str, Consumer] = {}
"""By name."""


def checks(name: str) -> Callable[[Check], Check]:
    """Adds the check of a format to `CHECKS`."""

    def add(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return add


def consumer(name: str, *, formats: tuple[str, ...], packages: tuple[str, ...], install: str) -> Callable[[Run], Run]:
    """Adds a consumer to `CONSUMERS`."""

    def add(run: Run) -> Run:
        CONSUMERS[name] = Consumer(name, formats, packages, install, run)
        return run

    return add


def consumer_of(to: str, name: str | None) -> Consumer | None:
    """The consumer of this name, or the first one of a format; None if no program here reads the format.

    Raises:
        UsageError: the name is unknown, or does not read the format.
    """
    if name is None:
        return next((found for found in CONSUMERS.values() if to in found.formats), None)
    if name not in CONSUMERS:
        raise UsageError(f"consumer {name!r}: unknown; choose one of {', '.join(CONSUMERS)}")
    found = CONSUMERS[name]
    if to not in found.formats:
        raise UsageError(f"consumer {name}: does not read {to}; it reads {', '.join(found.formats)}")
    return found
