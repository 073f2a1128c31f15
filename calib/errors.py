# SPDX-License-Identifier: Apache-2.0
"""The exception tree of calib.

Every error that a user can cause is a `CalibError`. Its message is one line, "<thing>: <reason>; <next step>",
and its class owns the exit code of the command line, so that no command decides on exit codes by itself.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CalibError",
    "CorpusError",
    "GateError",
    "Interrupted",
    "ModelError",
    "UsageError",
]


class CalibError(Exception):
    """Base of all errors that calib raises on purpose."""

    exit_code: int = 1


class UsageError(CalibError):
    """The request itself is wrong: an unknown name, a value out of range, an output folder in the way."""

    exit_code = 2


class ModelError(CalibError):
    """A model cannot be opened or run."""


class CorpusError(CalibError):
    """Calibration data cannot be read or does not suffice."""


class ArtifactError(CalibError):
    """A file of calib is missing, damaged, from another model, or of an unknown version."""


class GateError(CalibError):
    """The work was done, but a condition that makes its result trustworthy does not hold."""

    exit_code = 3


class Interrupted(CalibError):  # noqa: N818 - a stop on request, not an error
    """The user stopped the run; what was measured so far is kept."""

    exit_code = 130
