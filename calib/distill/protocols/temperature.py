# SPDX-License-Identifier: Apache-2.0
"""CMI against the temperature: how much of an MCMI teacher's gain a temperature would have given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from calib.distill.cmi import measure_information
from calib.distill.task import Task

__all__ = ["TEMPERATURES", "TemperaturePoint", "temperature_study"]

TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class TemperaturePoint:
    """CMI and NCMI of one teacher at one temperature, in nats and as a ratio."""

    teacher: str
    temperature: float
    cmi: float
    ncmi: float | None


def temperature_study(
    teachers: Mapping[str, nn.Module],
    loader: Iterable[Any],
    temperatures: Sequence[float] = TEMPERATURES,
    task: Task | None = None,
    **options: Any,
) -> list[TemperaturePoint]:
    """One pass per teacher, all temperatures at once.

    Args:
        teachers: name -> model.
        loader: data that can be read again.
        temperatures: of the softmax.
        task: how to read a batch.
        options: what else `measure_information` takes.
    """
    points = []
    for name, model in teachers.items():
        for information in measure_information(model, loader, task=task, temperatures=temperatures, **options):
            found = information.summary()
            points.append(TemperaturePoint(name, found.temperature, found.cmi, found.ncmi))
    return points
