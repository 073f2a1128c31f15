# SPDX-License-Identifier: Apache-2.0
"""Reads scales.json with nothing but Python: copy this file into a server. `python reader.py scales.json` lists it."""

import json
import math
import sys


def read_scales(path):  # type: ignore[no-untyped-def]
    """{name: (scale, zero_point)} of every static tensor, under each of its names.

    scale and zero_point are numbers, or lists with one per channel or row. q = clip(rint(x / scale) + zero_point).
    """
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - plain Python, older versions too
        content = json.load(file)
    if content.get("format") != "calib.scales" or content.get("version", "").split(".")[0] != "1":
        raise ValueError(f"{path}: is no scale file of version 1")
    found = {}
    for name, tensor in content["tensors"].items():
        scale, point = tensor["scale"], tensor["zero_point"]
        if scale is None:  # dynamic: the server computes it from each token
            continue
        for value in scale if isinstance(scale, list) else [scale]:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{path}: {name}: {value} is no usable scale")
        for alias in [name, *tensor["shared_with"]]:
            found[alias] = (scale, point)
    return found


if __name__ == "__main__":
    for key, entry in read_scales(sys.argv[1]).items():
        sys.stdout.write(f"{key} {entry[0]} {entry[1]}\n")
