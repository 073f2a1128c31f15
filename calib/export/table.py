# SPDX-License-Identifier: Apache-2.0
"""Compares a table of scales with what it should hold."""

from __future__ import annotations

import math

from calib.export.report import Verification

__all__ = ["check_against_ranges"]


def check_against_ranges(
    found: Verification, held: dict[str, tuple[float, int]], wanted: dict[str, tuple[float, int]]
) -> Verification:
    """Compares scales and zero points by name."""
    found.scales += len(wanted)
    for name, (right, right_point) in wanted.items():
        if name not in held:
            found.problems.append(f"{name}: is missing")
            continue
        scale, point = held[name]
        if not (math.isfinite(scale) and scale > 0):
            found.problems.append(f"{name}: holds {scale}, no usable scale")
        elif (scale, point) != (right, right_point):
            found.problems.append(
                f"{name}: is {scale:.9g} (zero point {point}), the scale file gives {right:.9g} ({right_point})"
            )
        else:
            found.scales_read += 1
    found.problems += [f"{name}: the scale file has no such tensor" for name in held if name not in wanted]
    return found
