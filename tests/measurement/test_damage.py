# SPDX-License-Identifier: Apache-2.0
"""What is damaged, tampered with, too new or of something else is refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from calib.corpus import TokenBlocks
from calib.errors import ArtifactError, GateError, ModelError
from calib.measurement import Measurement, MeasureOptions, measure
from calib.models import OpenedModel, open_model
from calib.scales import choose_scales

SITE = "model.layers.0.mlp.down_proj:input"
Record = dict[str, Any]


@pytest.fixture
def folder(whole: Measurement, tmp_path: Path) -> Path:
    whole.save(tmp_path / "measured")
    return tmp_path / "measured"


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Measurement.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    assert caught.value.exit_code == 1
    return message


def edit(folder: Path, change: Callable[[Record], object]) -> None:
    path = folder / "measurement.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def rename(record: Record) -> None:
    sites = record["sites"]
    names = list(sites)
    first, second = names.index(SITE), names.index("model.layers.0.mlp.down_proj:output")
    values = list(sites.values())
    values[first], values[second] = values[second], values[first]
    record["sites"] = dict(zip(names, values, strict=True))


def test_what_was_written_is_read(folder: Path, whole: Measurement) -> None:
    read = Measurement.load(folder)
    assert read.sha256 == whole.sha256
    assert (read.model, read.corpus, read.run, read.gates) == (whole.model, whole.corpus, whole.run, whole.gates)
    assert list(read.sites) == list(whole.sites)
    for name, site in whole.sites.items():
        fields = ("kind", "module", "port", "layer", "dtype", "channels", "aliases")
        assert [getattr(read.sites[name], f) for f in fields] == [getattr(site, f) for f in fields]
    assert {n: (w.tied, w.layer, w.dtype) for n, w in read.weights.items()} == {
        n: (w.tied, w.layer, w.dtype) for n, w in whole.weights.items()
    }


@pytest.mark.parametrize("version", ["2.0", "10.1", "0.9", "", None])
def test_another_major_version_is_refused(folder: Path, version: str | None) -> None:
    edit(folder, lambda record: record.update(version=version))
    assert "this calib reads 1.1; update calib" in refused(folder)


def test_a_newer_minor_version_of_the_same_fields_is_read(folder: Path, whole: Measurement) -> None:
    edit(folder, lambda record: record.update(version="1.7"))
    assert Measurement.load(folder).sha256 == whole.sha256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda r: r.pop("corpus"), "corpus: Field required"),
        (lambda r: r["run"].update(batch_size="many"), "run.batch_size"),
        (lambda r: r["sites"][SITE].pop("kind"), f"sites.{SITE}.kind: Field required"),
        (lambda r: r.update(statistics="some"), "statistics"),
        (lambda r: r.update(format="calib.scales"), "no measurement of calib"),
        (lambda r: r["sites"][SITE].update(amax=1.0), f"{SITE}: amax is 1.0, the arrays say"),
        (lambda r: r["sites"][SITE].update(max=float("nan")), f"{SITE}: max is nan, the arrays say"),
        (lambda r: r["sites"][SITE].update(min=None), f"{SITE}: min is None, the arrays say"),
        (lambda r: r["sites"][SITE].update(count=1), f"{SITE}: count is 1, the arrays say"),
        (lambda r: r["sites"][SITE].update(nonfinite=1), f"{SITE}: nonfinite is 1, the arrays say 0"),
        (lambda r: r["sites"][SITE].update(channels=64), f"{SITE}: channels is 64, the arrays say 128"),
        (rename, f"{SITE}: "),
        (lambda r: r["sites"].pop(SITE), "does not fit its sizes"),
        (lambda r: r["weights"].popitem(), "does not fit its sizes"),
        (lambda r: r.update(arrays_sha256="0" * 64), "differs from what measurement.json describes"),
    ],
)
def test_an_edited_record_is_refused_with_the_field(
    folder: Path, change: Callable[[Record], object], says: str
) -> None:
    edit(folder, change)
    assert says in refused(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null", b"not json"])
def test_a_record_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "measurement.json").write_bytes(content)
    assert "measurement.json" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_arrays_are_refused(folder: Path, keep: int) -> None:
    path = folder / "measurement.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "differs from what measurement.json describes" in refused(folder)


def test_one_flipped_bit_is_refused(folder: Path) -> None:
    path = folder / "measurement.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    assert "differs from what measurement.json describes" in refused(folder)


def forge(folder: Path, change: Callable[[dict[str, np.ndarray]], object] | bytes) -> None:
    """Arrays that the record vouches for, as a careful forger or another program would write them."""
    path = folder / "measurement.safetensors"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda record: record.update(arrays_sha256=digest))


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{}",
        lambda t: t.pop("sites/range.minimum"),
        lambda t: (t.pop("sites/range.sums"), t.pop("sites/range.sums/sizes")),
        lambda t: t.update({"sites/range.count": t["sites/range.count"][:-1]}),
        lambda t: t.update({"sites/unknown.field": np.zeros(1), "sites/unknown.field/sizes": np.zeros(1, np.int64)}),
        lambda t: (t.pop("weights/rows.minimum"), t.pop("weights/rows.minimum/sizes")),
    ],
)
def test_arrays_that_do_not_hold_what_is_needed_are_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], object] | bytes
) -> None:
    forge(folder, change)
    assert "measurement.safetensors" in refused(folder)


def test_missing_arrays_are_refused(folder: Path) -> None:
    (folder / "measurement.safetensors").unlink()
    assert "missing beside measurement.json" in refused(folder)


def test_what_is_unlike_does_not_merge(whole: Measurement, llama: OpenedModel, blocks: TokenBlocks) -> None:
    first = measure(llama, blocks, MeasureOptions(batch_size=2, shard=(0, 2), weights=False))
    second = measure(llama, blocks, MeasureOptions(batch_size=2, shard=(1, 2), weights=False))
    assert first.merge(second).passed
    other_model = second.model.model_copy(update={"config_sha256": "0" * 64})
    other_corpus = second.corpus.model_copy(update={"content_sha256": "0" * 64})
    for other, what in (
        (replace(second, model=other_model), "model"),
        (replace(second, corpus=other_corpus), "corpus"),
        (replace(second, run=second.run.model_copy(update={"sites_pattern": ["residual"]})), "selection"),
        (replace(second, weights=whole.weights), "weights"),
        (replace(second, run=second.run.model_copy(update={"dtype": "bfloat16"})), "dtype"),
        (replace(second, run=second.run.model_copy(update={"batch_size": 1})), "batch size"),
        (replace(second, run=second.run.model_copy(update={"sink_positions": 0})), "sink positions"),
    ):
        with pytest.raises(ArtifactError, match=f"merge: the measurements differ in {what};"):
            first.merge(other)
    with pytest.raises(ArtifactError, match="batch 0 is in both"):
        first.merge(first)
    name, site = next(iter(second.sites.items()))
    for change in ({"channels": 7}, {"dtype": "float16"}):
        with pytest.raises(ArtifactError, match=f"^merge: {name} has "):
            first.merge(replace(second, sites={**second.sites, name: replace(site, **change)}))


def test_measurements_of_two_models_do_not_merge(whole: Measurement, tiny_gpt2: Path, blocks: TokenBlocks) -> None:
    other = measure(open_model(tiny_gpt2, device="cpu"), blocks, MeasureOptions(batch_size=2))
    with pytest.raises(ArtifactError, match="differ in model"):
        whole.merge(other)


def test_a_gate_that_failed_in_one_shard_stays_failed(llama: OpenedModel, blocks: TokenBlocks) -> None:
    shards = [measure(llama, blocks, MeasureOptions(batch_size=2, shard=(i, 2), weights=False)) for i in (0, 1)]
    gates = [replace(g, passed=False, detail="broken") if g.name == "finite" else g for g in shards[1].gates]
    merged = shards[0].merge(replace(shards[1], gates=gates))
    assert [g.name for g in merged.gates if not g.passed] == ["finite"]
    assert [g.detail for g in merged.gates if not g.passed] == ["broken"]


def test_nan_weights_on_disk_are_refused_before_anything_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of 64 values of model\.norm\.weight are NaN"):
        open_model(tmp_path, device="cpu")


def test_nan_weights_in_memory_close_the_gate_and_reach_no_scale(
    tiny_llama: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    opened = open_model(tiny_llama, device="cpu")
    with torch.no_grad():
        opened.model.get_submodule("model.layers.2.mlp.up_proj").weight[5, 7] = torch.nan
    measurement = measure(opened, blocks, MeasureOptions(batch_size=2))
    (gate,) = (gate for gate in measurement.gates if not gate.passed)
    assert gate.name == "finite"
    assert "model.layers.2.mlp.up_proj:output" in gate.detail
    assert measurement.weights["model.layers.2.mlp.up_proj:weight"].statistics.range.nonfinite_all == 1
    measurement.save(tmp_path / "measured")
    read = Measurement.load(tmp_path / "measured")
    assert read.sha256 == measurement.sha256
    with pytest.raises(GateError, match="NaN or infinite"):
        choose_scales(read, bits=8)
    with pytest.raises(GateError, match=r"up_proj:weight: 1 NaN or infinite"):
        choose_scales(replace(read, sites={}), bits=8)
