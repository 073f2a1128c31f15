# SPDX-License-Identifier: Apache-2.0
"""A measurement that was interrupted and resumed is the measurement that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.corpus import TokenBlocks
from calib.errors import ArtifactError, GateError
from calib.measurement import Measurement, MeasureOptions, measure
from calib.measurement.engine import resume
from calib.models import OpenedModel, open_model

OPTIONS = MeasureOptions(batch_size=2)


def after(batches: int) -> Callable[[], bool]:
    """Says stop once that many batches are done."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= batches

    return should_stop


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("statistics", ["full", "ranges"])
def test_stopped_saved_loaded_and_resumed_is_byte_equal(
    batches: int, statistics: str, llama: OpenedModel, blocks: TokenBlocks, tmp_path: Path
) -> None:
    options = replace(OPTIONS, statistics=statistics)
    measure(llama, blocks, options, should_stop=after(batches)).save(tmp_path / "part")
    held = Measurement.load(tmp_path / "part")
    assert held.run.batches == list(range(batches))
    assert not held.passed
    resume(llama, blocks, held, replace(options, batch_size=None)).save(tmp_path / "resumed")
    measure(llama, blocks, options).save(tmp_path / "whole")
    arrays = [(tmp_path / name / "measurement.safetensors").read_bytes() for name in ("resumed", "whole")]
    assert arrays[0] == arrays[1]
    resumed, whole = (Measurement.load(tmp_path / name) for name in ("resumed", "whole"))
    assert resumed.sha256 == whole.sha256
    assert resumed.passed
    assert resumed.gates == whole.gates
    ignored = {"started", "seconds"}
    assert resumed.run.model_dump(exclude=ignored) == whole.run.model_dump(exclude=ignored)
    for name, site in whole.sites.items():
        assert (site.kind, site.aliases) == (resumed.sites[name].kind, resumed.sites[name].aliases)


def test_resume_may_be_interrupted_again(
    llama: OpenedModel, blocks: TokenBlocks, whole: Measurement, tmp_path: Path
) -> None:
    held = measure(llama, blocks, OPTIONS, should_stop=after(1))
    held = resume(llama, blocks, held, OPTIONS, should_stop=after(1))
    assert held.run.batches == [0, 1]
    assert not held.passed
    assert resume(llama, blocks, held, OPTIONS).sha256 == whole.sha256


def test_a_shard_is_resumed_within_its_shard(llama: OpenedModel, blocks: TokenBlocks) -> None:
    options = replace(OPTIONS, shard=(0, 2))
    held = measure(llama, blocks, options, should_stop=after(1))
    assert resume(llama, blocks, held, options).run.batches == [0, 2]


def test_a_complete_measurement_has_nothing_to_resume(
    llama: OpenedModel, blocks: TokenBlocks, whole: Measurement
) -> None:
    with pytest.raises(GateError, match="nothing is left"):
        resume(llama, blocks, whole, OPTIONS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"statistics": "ranges"}, "--statistics ranges: the measurement to resume has full"),
        ({"sink_positions": 0}, "--sink-positions 0: the measurement to resume has 4"),
        ({"sites": ["residual"]}, "--sites"),
        ({"ignore": ["residual"]}, "--ignore"),
    ],
)
def test_other_settings_are_refused_before_any_work(
    llama: OpenedModel, blocks: TokenBlocks, change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = measure(llama, blocks, OPTIONS, should_stop=after(1))
    monkeypatch.setattr(llama.model, "forward", lambda **_: pytest.fail("the model was run"))
    with pytest.raises(ArtifactError, match=says):
        resume(llama, blocks, held, replace(OPTIONS, **change))


def test_another_model_or_dtype_or_corpus_is_refused_before_any_work(
    llama: OpenedModel, blocks: TokenBlocks, tiny_llama: Path, tiny_gpt2: Path
) -> None:
    held = measure(llama, blocks, OPTIONS, should_stop=after(1))
    with pytest.raises(ArtifactError, match="another model"):
        resume(open_model(tiny_gpt2, device="cpu"), blocks, held, OPTIONS)
    with pytest.raises(ArtifactError, match="--dtype bfloat16"):
        resume(open_model(tiny_llama, device="cpu", dtype="bfloat16"), blocks, held, OPTIONS)
    other = replace(blocks, provenance=blocks.provenance.model_copy(update={"content_sha256": "0" * 64}))
    with pytest.raises(ArtifactError, match="other token blocks"):
        resume(llama, other, held, OPTIONS)
