# SPDX-License-Identifier: Apache-2.0
"""The registry of formats: what each carries, which cures it can express, and which consumers read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.export.request import ExportRequest, ExportSummary

__all__ = ["FORMATS", "Format", "Writer", "parse_format", "register"]

Writer = Callable[["ExportRequest"], "ExportSummary"]


@dataclass(frozen=True)
class Format:
    """One format that scales can be written in.

    Attributes:
        name: as `--to` takes it.
        summary: what is written.
        carries: what of a scale file survives in it.
        cures: names of cures it can express (`CureRecord.name`). One that is folded into weights is expressed by any
            format whose consumer runs the cured checkpoint; `keep` by any that can leave a layer in float; `clip` is in
            the ranges; one that is computed as the model runs, by those that say so to their consumers.
        consumers: programs that read it.
        proven: the consumer, or the parser, that the tests load it with.
        variants: what may follow the name after a colon, the first is the default.
        kv_heads: it takes one scale per head of keys and values.
        model: it holds weights or graph names, so that the model is needed.
        measurement: it holds statistics that a scale file lacks.
        extra: optional dependencies of calib that writing it needs.
        write: writes it.
    """

    name: str
    summary: str
    carries: str
    consumers: tuple[str, ...]
    proven: str
    write: Writer
    cures: tuple[str, ...] = ("smooth", "rotate", "keep", "clip")
    variants: tuple[str, ...] = ()
    kv_heads: bool = False
    model: bool = False
    measurement: bool = False
    extra: str = ""


FORMATS: dict[str, Format] = {}
"""By name."""


def register(
    name: str,
    *,
    summary: str,
    carries: str,
    consumers: tuple[str, ...],
    proven: str,
    cures: tuple[str, ...] = ("smooth", "rotate", "keep", "clip"),
    variants: tuple[str, ...] = (),
    kv_heads: bool = False,
    model: bool = False,
    measurement: bool = False,
    extra: str = "",
) -> Callable[[Writer], Writer]:
    """Adds a writer to `FORMATS`; the arguments are the fields of `Format`."""

    def add(write: Writer) -> Writer:
        FORMATS[name] = Format(
            name, summary, carries, consumers, proven, write, cures, variants, kv_heads, model, measurement, extra
        )
        return write

    return add


def parse_format(text: str) -> tuple[Format, str]:
    """A format and its variant, from `NAME` or `NAME:VARIANT`.

    Raises:
        UsageError: either is unknown.
    """
    name, _, variant = text.partition(":")
    if name not in FORMATS:
        raise UsageError(f"format {name!r}: unknown; choose one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if variant and variant not in found.variants:
        known = ", ".join(found.variants) or "none"
        raise UsageError(f"format {name}: has no variant {variant!r}; it has {known}")
    return found, variant or (found.variants[0] if found.variants else "")
