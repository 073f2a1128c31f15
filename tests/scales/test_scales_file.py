# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import calib.schema
from calib.errors import ArtifactError
from calib.scales import choose_scales, json_schema, load_scales, save_scales
from calib.scales.shortest import shortest, shortest_list
from calib.schema.scales import ScaleFile

SCHEMA = Path(calib.schema.__file__).with_name("scales.schema.json")


@pytest.fixture(scope="module")
def scales(lab: Any) -> ScaleFile:
    x = lab.values("normal", 2 * 16 * 8).reshape(2, 16, 8)
    return choose_scales(lab.measurement(lab.site("fc:input", x), lab.weight("fc", x[0])), symmetric=False)


def test_the_published_schema_is_current() -> None:
    """After a change of `calib/schema/scales.py`, write `json_schema()` to this file with indent=2."""
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_a_file_follows_the_published_schema(scales: ScaleFile, tmp_path: Path) -> None:
    content = json.loads(save_scales(scales, tmp_path).read_text())
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    content["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(content, schema)


def test_what_is_read_is_what_was_written(scales: ScaleFile, tmp_path: Path) -> None:
    path = save_scales(scales, tmp_path / "new" / "folder")
    assert load_scales(path) == load_scales(path.parent) == scales
    again = save_scales(scales, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_a_tensor_is_one_line(scales: ScaleFile, tmp_path: Path) -> None:
    lines = save_scales(scales, tmp_path).read_text().splitlines()
    assert sum(line.startswith('    "fc:') for line in lines) == 2


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_numbers_read_back_as_the_same_float32(x: float) -> None:
    written = json.loads(json.dumps(shortest(x)))
    assert np.float32(written).tobytes() == np.float32(x).tobytes()
    assert len(repr(written)) <= len(repr(float(np.float32(x))))


@given(arrays(np.float32, 20, elements=st.floats(2.0**-126, 2.0**127, width=32)))
def test_lists_read_back_as_the_same_float32(x: np.ndarray) -> None:
    written = json.loads(json.dumps(shortest_list(x)))
    np.testing.assert_array_equal(np.array(written, np.float32), x)


def damaged(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "2.0"}, "version 2.0 is not readable by this calib"),
        ({"version": None}, "version None is not readable"),
        ({"format": "calib.measurement"}, "not a scale file"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"bits": "8"}, "bits: Input should be a valid integer"),
        ({"bits": 40}, "bits: Input should be less than or equal to 16"),
        ({"verdict": "maybe"}, "verdict: Input should be"),
    ],
)
def test_a_file_that_is_not_valid_is_refused_in_one_line(
    scales: ScaleFile, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = save_scales(scales, tmp_path)
    damaged(path, **change)
    with pytest.raises(ArtifactError, match=says) as caught:
        load_scales(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("scale", ["0", "-1.0", "NaN", "Infinity", "1e999"])
def test_no_scale_is_zero_negative_or_not_finite(scales: ScaleFile, tmp_path: Path, scale: str) -> None:
    path = save_scales(scales, tmp_path)
    number = json.dumps(scales.tensors["fc:input"].scale)
    text = path.read_text()
    assert f'"scale": {number}' in text
    path.write_text(text.replace(f'"scale": {number}', f'"scale": {scale}'))
    with pytest.raises(ArtifactError):
        load_scales(path)


def test_a_newer_minor_version_is_read(scales: ScaleFile, tmp_path: Path) -> None:
    path = save_scales(scales, tmp_path)
    damaged(path, version="1.7")
    assert load_scales(path).version == "1.7"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"scales"', b"\xff\xfe\x00binary", b'{"format": NaN}'])
def test_what_is_no_scale_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scales.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not valid JSON|not a scale file"):
        load_scales(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"scales\.json: no such file; write one with `calib quantize`$"):
        load_scales(tmp_path)


def test_an_invalid_record_reaches_no_file(scales: ScaleFile, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bits"):
        save_scales(scales.model_copy(update={"bits": 77}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    scales: ScaleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_scales(scales, tmp_path)
    before = path.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match=r"cannot be written .No space left on device.; free space"):
        save_scales(scales, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_refused(scales: ScaleFile, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_scales(scales, tmp_path / "taken")
