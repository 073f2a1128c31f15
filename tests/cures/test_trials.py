# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calib.corpus import build_blocks
from calib.cures.candidate import Candidate
from calib.cures.result import CureOptions
from calib.cures.trials import Trial, Trials
from calib.measurement import MeasureOptions, measure
from calib.models import open_model


def test_candidates_are_worth_the_same_whatever_they_are_computed_in(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(tiny_llama, device="cpu")
    blocks = build_blocks(["builtin:speeches"], opened.tokenizer, samples=12, max_length=32)
    measurement = measure(opened, blocks.select(range(8)), MeasureOptions(batch_size=4))
    found: dict[bool, Trial] = {}
    for fast in (False, True):
        monkeypatch.setattr("calib.cures.trials.has_fast_int8", lambda device, fast=fast: fast)
        trials = Trials(opened, measurement, blocks, blocks.select(range(4)), CureOptions(), lambda line: None)
        candidate = Candidate(8, True, measurement, measurement)
        with trials.quantized(candidate) as quantized:
            assert quantized.mode == ("int8" if fast else "fake")
            assert not quantized.not_int8
        found[fast] = trials.attempt(candidate)
    np.testing.assert_allclose(found[True].score.divergence, found[False].score.divergence, rtol=0.05)
    assert found[False].score.mean > 0
