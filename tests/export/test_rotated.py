# SPDX-License-Identifier: Apache-2.0
"""A model with rotated inputs, from `calib quantize` to a checkpoint that names the rotation, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.cures.rotate import OnlineRotation
from calib.errors import ArtifactError, ModelError
from calib.export import FORMATS, export_scales, verify_export
from calib.export.emulate import compressed_tensors_plan, float_model
from calib.export.importing import import_scales
from calib.export.read_compressed_tensors import read_compressed_tensors
from calib.measurement import MeasureOptions, measure
from calib.models import open_model
from calib.quantized import QuantizedModel
from calib.scales import load_scales
from tests.cli.commands import SMALL, run
from tests.cures.models import spiked

transform = pytest.importorskip("compressed_tensors.transform")

DOWN = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]


@pytest.fixture(scope="module")
def spiky(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with channels that only a rotation takes apart."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("spiky") / "llama")
    opened = open_model(tiny_llama, device="cpu")
    spiked(opened.model)
    opened.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cured(spiky: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cured") / "int8"
    assert run("quantize", spiky, "-o", out, *SMALL, "--cure", "rotate-online", "--target", 1.0, "-q") == 0
    return out


@pytest.fixture
def copy(cured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cured, tmp_path / "copy")


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_the_checkpoint_names_the_rotation_and_holds_its_matrix(cured: Path) -> None:
    (record,) = load_scales(cured).cures
    assert record.name == "rotate-online"
    settings = json.loads((cured / "config.json").read_text())["quantization_config"]["transform_config"]
    parsed = transform.TransformConfig.model_validate(settings)
    ((group, scheme),) = parsed.config_groups.items()
    assert scheme.apply[0].targets == record.settings["modules"] == DOWN
    matrix = load_file(cured / "model.safetensors")[f"{DOWN[0]}.{group}_input.weight"]
    assert matrix.shape == (scheme.head_dim, scheme.head_dim)
    torch.testing.assert_close(matrix @ matrix.T, scheme.head_dim * torch.eye(scheme.head_dim))


def test_transformers_with_the_transforms_of_compressed_tensors_computes_what_was_judged_bit_for_bit(
    cured: Path,
) -> None:
    found = verify_export(cured, "transformers")
    assert not found.problems
    assert not found.not_checked  # values too: the scale file lies beside the checkpoint
    report = found.consumer
    assert report is not None
    assert report.layers_exact == report.layers > 0
    assert report.model_difference == 0.0


def test_the_model_is_opened_with_its_rotation(spiky: Path, cured: Path) -> None:
    """Opened without, it would be another function: transformers alone gives that."""
    ids = torch.arange(3, 19)[None]
    read = read_compressed_tensors(cured)
    reference = float_model(read)
    with torch.no_grad():
        plain = open_model(spiky, device="cpu").model(input_ids=ids).logits
        opened = open_model(cured, device="cpu").model(input_ids=ids).logits
        with QuantizedModel(reference, compressed_tensors_plan(read)):
            expected = reference(input_ids=ids).logits
        changed_inputs = type(reference).from_pretrained(cured, dtype="float32")(input_ids=ids).logits
    torch.testing.assert_close(opened, expected, rtol=0, atol=0)
    assert (opened - plain).norm() < 0.1 * plain.norm() < (changed_inputs - plain).norm()


def test_a_measurement_of_it_is_of_rotated_inputs(spiky: Path, cured: Path) -> None:
    from calib.corpus import build_blocks

    opened, float_one = open_model(cured, device="cpu"), open_model(spiky, device="cpu")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=2, max_length=32)
    OnlineRotation(tuple(DOWN)).apply(float_one.model)
    found, expected = (measure(one, blocks, MeasureOptions(sites=["linear_input"])) for one in (opened, float_one))
    assert found.sites.keys() == expected.sites.keys()
    for name in DOWN:
        amax = [one.sites[f"{name}:input"].statistics.range.amax for one in (found, expected)]
        assert amax[0] == pytest.approx(amax[1], rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.pop("transform_config"),
        lambda settings: settings["transform_config"]["config_groups"]["R4_128"].update(head_dim=64),
        lambda settings: settings["transform_config"]["config_groups"]["R4_128"]["apply"][0]["targets"].pop(),
    ],
    ids=["dropped", "another block", "a layer less"],
)
def test_another_rotation_is_found(change: Callable[[dict[str, Any]], object], copy: Path) -> None:
    changed(copy, change)
    problems = verify_export(copy, run=False).problems
    assert any("transform_config is not the rotation" in problem for problem in problems)


def test_an_import_knows_that_the_ranges_are_of_rotated_inputs(cured: Path, copy: Path) -> None:
    assert import_scales(cured).cures == load_scales(cured).cures
    (copy / "scales.json").unlink()
    (record,) = import_scales(copy).cures
    assert (record.name, record.settings["modules"]) == ("rotate-online", DOWN)


def test_matrices_of_another_program_are_read_from_the_checkpoint(copy: Path) -> None:
    """Type random-matrix: what is stored counts, whatever compressed-tensors would draw."""
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = open_model(copy, device="cpu").model(input_ids=ids).logits
        changed(copy, lambda s: s["transform_config"]["config_groups"]["R4_128"].update(type="random-hadamard"))
        same = open_model(copy, device="cpu").model(input_ids=ids).logits
        tensors = load_file(copy / "model.safetensors")
        tensors[f"{DOWN[0]}.R4_128_input.weight"] *= -1
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        negated = open_model(copy, device="cpu").model(input_ids=ids).logits
    torch.testing.assert_close(same, before, rtol=0, atol=0)
    assert (negated - before).abs().max() > 0.01
    with pytest.raises(ArtifactError, match="a transform of type random-hadamard at input"):
        import_scales_alone(copy)


def import_scales_alone(folder: Path) -> None:
    (folder / "scales.json").unlink()
    import_scales(folder)


def _lost(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{DOWN[0]}.R4_128_input.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed(folder, lambda s: s["transform_config"]["config_groups"]["R4_128"].update(type="random-matrix"))


def _scheme(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        changed(folder, lambda s: s["transform_config"]["config_groups"]["R4_128"].update(values))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_lost, r"R4_128_input.weight is missing"),
        (_scheme(type="twist"), "does not fit the model"),
        (_scheme(head_dim=48), "does not fit the model"),
        (_scheme(form="new"), "cannot be read"),
        (_scheme(apply=[{"targets": ["re:.*self_attn$"], "location": "k_cache"}]), "transforms k_cache"),
    ],
)
def test_a_transform_that_cannot_be_computed_is_refused(damage: Callable[[Path], None], said: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=said):
        open_model(copy, device="cpu")


def test_formats_that_cannot_say_it_refuse(spiky: Path, cured: Path, tmp_path: Path) -> None:
    assert [name for name, one in FORMATS.items() if "rotate-online" in one.cures] == ["compressed-tensors"]
    scales = load_scales(cured)
    with pytest.raises(ArtifactError, match="cannot express the cure 'rotate-online'"):
        export_scales(scales, tmp_path / "onnx", open_model(spiky, device="cpu"), to="onnx-qdq", source=cured)
    signed = scales.cures[0].model_copy(update={"settings": {**scales.cures[0].settings, "signs_seed": 1}})
    model = open_model(spiky, device="cpu")
    mine = scales.model_copy(update={"cures": [signed], "model": model.provenance})
    with pytest.raises(ArtifactError, match="rotated with signs"):
        export_scales(mine, tmp_path / "signed", model, to="compressed-tensors")


def test_export_and_verify_say_who_computes_it(
    spiky: Path, cured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fp8"
    assert run("export", cured, "--to", "compressed-tensors:fp8", "--model", spiky, "-o", out) == 0
    assert "transformers up to 5.23 ignores it" in " ".join(capsys.readouterr().out.split())
    assert run("verify", out, "--consumer", "transformers", "-q") == 0
    changed(out, lambda settings: settings.pop("transform_config"))
    assert run("verify", out) == 3
