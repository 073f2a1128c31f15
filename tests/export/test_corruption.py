# SPDX-License-Identifier: Apache-2.0
"""Twenty-odd ways to damage a checkpoint. Each is found by what it damages, for the hashes are made right again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.errors import ArtifactError, CalibError
from calib.export import export_scales, verify_export
from calib.export.manifest import MANIFEST
from calib.models.hashing import sha256_of_file
from tests.export.conftest import Lab

LAYER = "model.layers.1"
Q, K, V = (f"{LAYER}.self_attn.{part}_proj" for part in "qkv")
DOWN, UP = f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(llama: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corruption") / "whole"
    export_scales(
        llama.scales(symmetric=False),
        folder,
        llama.opened,
        to="compressed-tensors",
        kv_cache=True,
        shard_size="100KB",
    )
    return folder


class Damage:
    """A copy of a checkpoint that can be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shard(self, name: str) -> Path:
        return self.folder / json.loads((self.folder / INDEX).read_text())["weight_map"][name]

    def tensors(self, *names: str, change: Callable[..., dict[str, torch.Tensor | None]]) -> None:
        """Replaces tensors by what `change` makes of them; None removes one."""
        values = [load_file(self.shard(name))[name] for name in names]
        for name, value in change(*values).items():
            index = json.loads((self.folder / INDEX).read_text())
            path = self.folder / index["weight_map"].get(name, index["weight_map"][names[0]])
            held = load_file(path)
            if value is None:
                del held[name]
                del index["weight_map"][name]
            else:
                held[name] = value
                index["weight_map"][name] = path.name
            save_file(held, path, metadata={"format": "pt"})
            (self.folder / INDEX).write_text(json.dumps(index))

    def one(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        self.tensors(name, change=lambda value: {name: change(value)})

    def json(self, file: str, change: Callable[[Any], None]) -> None:
        content = json.loads((self.folder / file).read_text())
        change(content)
        (self.folder / file).write_text(json.dumps(content))

    def rehash(self) -> None:
        def again(manifest: Any) -> None:
            for name in manifest["files"]:
                if (self.folder / name).is_file():
                    manifest["files"][name] = sha256_of_file(self.folder / name)

        self.json(MANIFEST, again)


def swapped(damage: Damage) -> None:
    a, b = f"{DOWN}.input_scale", f"{LAYER}.self_attn.o_proj.input_scale"
    damage.tensors(a, b, change=lambda x, y: {a: y, b: x})


def truncated(damage: Damage) -> None:
    path = damage.shard(f"{DOWN}.weight")
    path.write_bytes(path.read_bytes()[:-100])


def misplaced(damage: Damage) -> None:
    def elsewhere(index: Any) -> None:
        places = index["weight_map"]
        places[f"{Q}.weight"] = next(file for file in places.values() if file != places[f"{Q}.weight"])

    damage.json(INDEX, elsewhere)


def stale(damage: Damage) -> None:
    def widen(scales: Any) -> None:
        tensor = scales["tensors"][f"{DOWN}:input"]
        tensor["range_max"] *= 2

    damage.json("scales.json", widen)


def other_model(damage: Damage) -> None:
    damage.json("scales.json", lambda s: s["model"].update(config_sha256="0" * 64))


def bfloat16(damage: Damage) -> None:
    damage.json("config.json", lambda c: c.update(dtype="bfloat16"))


KINDS: dict[str, tuple[Callable[[Damage], object], str]] = {
    "input scale missing": (lambda d: d.one(f"{DOWN}.input_scale", lambda _: None), f"{DOWN}.input_scale: is missing"),
    "weight scale missing": (lambda d: d.one(f"{Q}.weight_scale", lambda _: None), f"{Q}.weight_scale: is missing"),
    "zero point missing": (lambda d: d.one(f"{Q}.input_zero_point", lambda _: None), "input_zero_point: is missing"),
    "key scale missing": (lambda d: d.one(f"{LAYER}.self_attn.k_scale", lambda _: None), "k_scale: is missing"),
    "norm missing": (
        lambda d: d.one(f"{LAYER}.input_layernorm.weight", lambda _: None),
        "layernorm.weight: is missing",
    ),
    "scale NaN": (lambda d: d.one(f"{DOWN}.input_scale", lambda x: x * torch.nan), "holds nan, no usable scale"),
    "scale zero": (lambda d: d.one(f"{DOWN}.input_scale", lambda x: x * 0), "holds 0.0, no usable scale"),
    "scale infinite": (lambda d: d.one(f"{DOWN}.weight_scale", lambda x: x / 0), "holds inf, no usable scale"),
    "scale negative": (lambda d: d.one(f"{DOWN}.input_scale", lambda x: -x), "no usable scale"),
    "scales swapped": (swapped, f"{DOWN}.input_scale: is "),
    "scale without an axis": (lambda d: d.one(f"{UP}.input_scale", lambda x: x[0]), "has shape [], must be [1]"),
    "weight scale flat": (
        lambda d: d.one(f"{UP}.weight_scale", lambda x: x[:, 0]),
        "has shape [128], must be [128, 1]",
    ),
    "scale in bfloat16": (lambda d: d.one(f"{UP}.input_scale", lambda x: x.bfloat16()), "is bfloat16, must be float32"),
    "weight in float": (lambda d: d.one(f"{UP}.weight", lambda x: x.float()), "is float32, must be int8"),
    "siblings unequal": (lambda d: d.one(f"{V}.input_scale", lambda x: x * 3), "have unequal scales"),
    "scale of no layer": (
        lambda d: d.tensors(f"{Q}.input_scale", change=lambda x: {"model.norm.input_scale": x}),
        "model.norm.input_scale: no layer that is quantized reads it",
    ),
    "codes of another scale": (lambda d: d.one(f"{DOWN}.weight", lambda x: x // 2), "they are of another scale"),
    "norm NaN": (lambda d: d.one("model.norm.weight", lambda x: x * torch.nan), "model.norm.weight: holds NaN"),
    "shard truncated": (truncated, "is truncated or damaged"),
    "shard missing": (lambda d: d.shard(f"{DOWN}.weight").unlink(), "is missing"),
    "index wrong": (misplaced, f"{Q}.weight: the index places it in"),
    "layer ignored": (
        lambda d: d.json("config.json", lambda c: c["quantization_config"]["ignore"].append(DOWN)),
        f"{DOWN}.input_scale: no layer that is quantized reads it",
    ),
    "head not ignored": (
        lambda d: d.json("config.json", lambda c: c["quantization_config"]["ignore"].clear()),
        "lm_head.weight_scale: is missing",
    ),
    "called symmetric": (
        lambda d: d.json(
            "config.json",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(symmetric=True),
        ),
        "input_zero_point: no layer that is quantized reads it",
    ),
    "called dynamic": (
        lambda d: d.json(
            "config.json",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(dynamic=True),
        ),
        "are not static 8 bits",
    ),
    "quantization forgotten": (
        lambda d: d.json("config.json", lambda c: c.pop("quantization_config")),
        "has no quantization_config",
    ),
    "cache scheme forgotten": (
        lambda d: d.json("config.json", lambda c: c["quantization_config"].pop("kv_cache_scheme")),
        "k_scale: no layer that is quantized reads it",
    ),
    "another architecture": (
        lambda d: d.json("config.json", lambda c: c.update(num_hidden_layers=4)),
        "model.layers.3.self_attn.q_proj.weight: is missing",
    ),
    "another model's scales": (other_model, "is of another model"),
    "scale file edited": (stale, f"{DOWN}.input_scale: is "),
    "served in another dtype": (bfloat16, "the scales were measured in float32"),
    "another tokenizer": (
        lambda d: d.json("tokenizer.json", lambda t: t["model"]["vocab"].update({"new": 300})),
        "tokenizer: is not the one",
    ),
    "scale file missing": (lambda d: (d.folder / "scales.json").unlink(), "scales.json: no such file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_damage_is_found_and_named(kind: str, whole: Path, tmp_path: Path) -> None:
    change, said = KINDS[kind]
    damage = Damage(shutil.copytree(whole, tmp_path / "copy"))
    change(damage)
    damage.rehash()
    try:
        problems = verify_export(damage.folder, run=False).problems
    except CalibError as error:
        problems = [str(error)]
    assert any(said in problem for problem in problems), problems


def test_a_whole_checkpoint_has_no_problem(whole: Path) -> None:
    found = verify_export(whole, run=False)
    assert (found.problems, found.not_checked) == ([], [])
    assert found.scales_read == found.scales == 21 * 3 + 3 * 2


def test_a_flipped_bit_that_breaks_no_rule_is_found_by_its_hash(whole: Path, tmp_path: Path) -> None:
    damage = Damage(shutil.copytree(whole, tmp_path / "copy"))
    damage.one("model.norm.weight", lambda x: x * 1.5)
    file = damage.shard("model.norm.weight").name
    damage.json(MANIFEST, lambda m: m["files"].update({INDEX: sha256_of_file(damage.folder / INDEX)}))
    assert verify_export(damage.folder, run=False).problems == [f"{file}: has changed since it was exported"]


@pytest.mark.parametrize(
    "damage",
    [{"config_groups": [1]}, {"config_groups": {"g": "x"}}, {"ignore": "lm_head"}, {"ignore": ["re:("]}],
    ids=str,
)
def test_a_configuration_of_other_types_is_refused(damage: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    Damage(folder).json("config.json", lambda config: config["quantization_config"].update(damage))
    with pytest.raises(ArtifactError, match=r"its quantization_config is damaged \(.+\); export again"):
        verify_export(folder)


def test_a_damaged_record_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CalibError, match="is damaged"):
        verify_export(folder)
