# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's `act_scales`: the largest magnitude of every input channel of every linear layer.

``{module: float32 [in]}``, as `get_act_scales` of the reference makes it (mit-han-lab/smoothquant, calibration.py). Its
`smooth_lm` and several forks load it with `torch.load`, hence the variant `pt`; the default is safetensors, which
holds no code.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from calib.errors import ArtifactError
from calib.export.formats import register
from calib.export.request import ExportRequest, ExportSummary

__all__ = ["FILES", "export_smoothquant"]

FILES = {"safetensors": "act_scales.safetensors", "pt": "act_scales.pt"}


@register(
    "smoothquant",
    summary="act_scales: largest magnitude per input channel",
    carries="channel ranges of linear inputs; no scale of the whole tensor",
    consumers=("smoothquant smooth_lm", "QUIK", "forks of both"),
    proven="torch.load(weights_only=True) and safetensors",
    variants=("safetensors", "pt"),
    measurement=True,
)
def export_smoothquant(request: ExportRequest) -> ExportSummary:
    """Writes `act_scales.safetensors` or `act_scales.pt`.

    Raises:
        ArtifactError: the measurement has no channel statistics.
    """
    found: dict[str, torch.Tensor] = {}
    for site in request.measured.sites.values():
        kinds = {site.name: site.kind, **site.aliases}
        for name, kind in kinds.items():
            if kind != "linear_input" or not name.endswith(":input"):
                continue
            channels = site.statistics.channels
            if channels is None:
                raise ArtifactError(f"{name}: its channels were not measured; measure without --statistics ranges")
            found[name.removesuffix(":input")] = torch.from_numpy(channels.amax.astype(np.float32).copy())
    path = request.folder / FILES[request.variant]
    if request.variant == "pt":
        torch.save(found, path)
    else:
        save_file(found, path)
    return ExportSummary(list(found))
