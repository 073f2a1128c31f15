# SPDX-License-Identifier: Apache-2.0
"""Runs in aimet-onnx's own environment: loads a float graph and encodings; imports nothing of calib.

`python aimet_run.py FOLDER FEED.npz OUT.npz`: the output of the simulation, and how many quantizers got an encoding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main() -> None:
    folder, feed, out = map(Path, sys.argv[1:4])
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim

    model = onnx.load(folder / "model.onnx")
    simulation = QuantizationSimModel(model)
    load_encodings_to_sim(simulation, str(folder / "model.encodings"), strict=False)
    enabled = [name for name, quantizer in simulation.qc_quantize_op_dict.items() if quantizer.enabled]
    inputs = dict(np.load(feed))
    output = simulation.session.run(None, inputs)[0]
    np.savez(out, output=output, enabled=np.array(enabled))


if __name__ == "__main__":
    main()
