# SPDX-License-Identifier: Apache-2.0
"""An importance matrix for llama.cpp: mean squares of every channel that a weight is multiplied by, no scales.

GGUF (`general.type` = imatrix): per weight `<name>.in_sum2`, float32 ``[1, in]``, the sum of x^2 over tokens, and
`<name>.counts`, float32 ``[1, 1]``, the tokens. The older `.dat`: entries of name, number of calls, number of values,
sum of squares per token times calls. Both: llama.cpp, `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`.
Names are those of the GGUF file that llama.cpp's converter makes of the checkpoint.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import ArtifactError, ModelError
from calib.export.formats import register
from calib.export.request import ExportRequest, ExportSummary
from calib.measurement.artifact import Measurement

__all__ = ["FILES", "export_imatrix", "gguf_names", "input_energies"]

FILES = {"gguf": "imatrix.gguf", "dat": "imatrix.dat"}
_SAME_AS = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "roberta": "bert"}
"""model_type of transformers -> architecture of llama.cpp, where the two differ."""


@register(
    "imatrix",
    summary="importance matrix: sums of squares per input channel, GGUF names",
    carries="channel energies of linear inputs; no scale",
    consumers=("llama.cpp llama-quantize --imatrix",),
    proven="gguf's reader, llama.cpp's loader",
    variants=("gguf", "dat"),
    measurement=True,
)
def export_imatrix(request: ExportRequest) -> ExportSummary:
    """Writes `imatrix.gguf` or `imatrix.dat`.

    Raises:
        ArtifactError: the measurement has no channel statistics.
        ModelError: llama.cpp knows no such architecture.
    """
    measurement = request.measured
    energies = input_energies(measurement)
    names = gguf_names(measurement, list(energies))
    left = {name: "llama.cpp has no tensor for it" for name in energies if name not in names}
    entries = {names[name]: energies[name] for name in energies if name in names}
    path = request.folder / FILES[request.variant]
    if request.variant == "dat":
        _write_dat(path, entries, measurement)
    else:
        _write_gguf(path, entries, measurement)
    aliases = {f"{name}:weight": names[name] for name in energies if name in names}
    return ExportSummary([name for name in energies if name in names], left, aliases={"gguf": aliases})


def input_energies(measurement: Measurement) -> dict[str, tuple[NDArray[np.float64], int]]:
    """Sum of squares per channel ``[in]``, and tokens, of the input of each linear layer.

    Raises:
        ArtifactError: only ranges were measured.
    """
    found: dict[str, tuple[NDArray[np.float64], int]] = {}
    for site in measurement.sites.values():
        kinds = {site.name: site.kind, **site.aliases}
        readers = [name for name, kind in kinds.items() if kind == "linear_input" and name.endswith(":input")]
        channels = site.statistics.channels
        for name in readers:
            if channels is None:
                raise ArtifactError(f"{name}: its channels were not measured; measure without --statistics ranges")
            tokens = site.statistics.range.count_all // site.channels
            found[name.removesuffix(":input")] = (channels.sum_of_squares.sum(0), int(tokens))
    return found


def gguf_names(measurement: Measurement, modules: list[str]) -> dict[str, str]:
    """Module -> name of its weight in a GGUF file; modules that llama.cpp has no name for are left out.

    Raises:
        ModelError: the architecture is unknown to the gguf package.
    """
    import gguf

    kind = measurement.model.model_type
    # the text half of a model of pictures (gemma3_text) has the name of the whole
    wanted = _SAME_AS.get(kind, kind).removesuffix("_text").replace("_", "")
    known = {name.replace("-", "").replace("_", ""): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if wanted not in known:
        raise ModelError(f"{measurement.model.name}: llama.cpp knows no architecture {kind}; imatrix needs one")
    layers = [site.layer for site in measurement.sites.values() if site.layer is not None]
    table = gguf.get_tensor_name_map(known[wanted], max(layers, default=0) + 1)
    pairs = ((module, table.get_name(module)) for module in modules)
    return {module: f"{name}.weight" for module, name in pairs if name is not None}


def _dataset(measurement: Measurement) -> list[str]:
    return [source.name for source in measurement.corpus.sources] or ["unknown"]


def _write_gguf(path: Path, entries: dict[str, tuple[NDArray[np.float64], int]], measurement: Measurement) -> None:
    import gguf

    writer: Any = gguf.GGUFWriter(path, arch="")
    # the writer begins every file with an architecture, which an importance matrix has not
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    writer.add_string(gguf.Keys.General.TYPE, "imatrix")
    writer.add_array("imatrix.datasets", _dataset(measurement))
    writer.add_uint32("imatrix.chunk_count", measurement.corpus.blocks)
    writer.add_uint32("imatrix.chunk_size", measurement.corpus.max_length)
    for name, (energy, tokens) in sorted(entries.items()):
        writer.add_tensor(f"{name}.in_sum2", energy.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[tokens]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_dat(path: Path, entries: dict[str, tuple[NDArray[np.float64], int]], measurement: Measurement) -> None:
    calls = max(measurement.corpus.blocks, 1)
    parts = [struct.pack("<i", len(entries))]
    for name, (energy, tokens) in sorted(entries.items()):
        values = (energy / tokens * calls).astype("<f4")
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", calls, values.size), values.tobytes()]
    dataset = _dataset(measurement)[0].encode()
    parts += [struct.pack("<ii", calls, len(dataset)), dataset]
    path.write_bytes(b"".join(parts))
