# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from calib.distill.centroids import ClassBalancedBatches
from calib.distill.cmi import measure_information
from calib.distill.distillation import EpochRecord
from calib.distill.guard import CollapseGuard, GuardLimits
from calib.distill.optimiser import OptimiserSettings
from calib.distill.sweep import sweep_strength
from calib.distill.teacher import TeacherSettings, fine_tune, fine_tune_with_control
from calib.errors import UsageError

SETTINGS = TeacherSettings(
    strength=0.5, epochs=6, optimiser=OptimiserSettings(name="adamw", learning_rate=1e-3, schedule="constant")
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cmi_rises_with_strength_and_falls_without(mixture: Any, seed: int) -> None:
    settings = replace(SETTINGS, seed=seed)
    result = fine_tune_with_control(mixture.copy(), mixture.loader(), settings, validation=mixture.loader("validation"))
    assert result.control is not None
    before, after, control = result.mcmi.before.cmi, result.mcmi.after.cmi, result.control.after.cmi
    assert result.mcmi.before == result.control.before
    assert after > before > control
    assert result.mcmi.validation is not None
    assert result.warnings == []
    weaker = fine_tune(mixture.copy(), mixture.loader(), replace(settings, strength=0.2))
    assert control < weaker.after.cmi < after


def test_the_teacher_is_fine_tuned_in_place_and_measured_as_reported(mixture: Any) -> None:
    teacher = mixture.copy()
    run = fine_tune(teacher, mixture.loader(), replace(SETTINGS, epochs=2))
    assert len(run.epochs) == 2
    assert measure_information(teacher, mixture.loader(shuffle=False))[0].summary().cmi == pytest.approx(run.after.cmi)
    assert not torch.equal(teacher[0].weight, mixture.teacher[0].weight)


def test_epochs_are_logged_with_what_is_minimised_and_the_cmi_after_them(mixture: Any) -> None:
    logged: list[tuple[str, EpochRecord]] = []
    settings = replace(SETTINGS, epochs=1, optimiser=OptimiserSettings("sgd", 1e-9))  # hardly moves
    whole = DataLoader(mixture.train, batch_size=len(mixture.train) // 2)  # a mean over batches is one over samples
    teacher = mixture.copy()
    run = fine_tune(
        teacher, whole, settings, name="seed 3, teacher", log=lambda name, record: logged.append((name, record))
    )
    [(name, record)] = logged
    assert name == "seed 3, teacher, lambda 0.5"
    assert (record.epoch, record.steps) == (1, len(whole))
    assert len(whole) == 2
    assert record.loss == pytest.approx(-run.before.log_likelihood - 0.5 * run.before.cmi, abs=1e-4)
    assert record.cmi == run.after.cmi


def test_the_same_seed_gives_the_same_teacher_and_leaves_the_generator_alone(mixture: Any) -> None:
    state = torch.random.get_rng_state()
    runs = [fine_tune(mixture.copy(), mixture.loader(), replace(SETTINGS, epochs=2)).after for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_moving_average_of_balanced_batches_serves_as_centroids(mixture: Any) -> None:
    labels = mixture.train.tensors[1].tolist()
    balanced = DataLoader(mixture.train, batch_sampler=ClassBalancedBatches(labels, per_class=8))
    settings = replace(SETTINGS, refresh="ema", ema_momentum=0.9)
    moved = fine_tune(mixture.copy(), mixture.loader(), settings, balanced=balanced)
    control = fine_tune(mixture.copy(), mixture.loader(), replace(settings, strength=0.0), balanced=balanced)
    assert moved.stopped is None
    assert moved.after.cmi > control.after.cmi
    with pytest.raises(UsageError, match="class-balanced"):
        fine_tune(mixture.copy(), mixture.loader(), settings)


def test_stale_centroids_trip_the_guard_where_fresh_ones_do_not(mixture: Any) -> None:
    settings = replace(SETTINGS, strength=0.9, epochs=16)
    teacher = mixture.copy()
    stale = fine_tune(teacher, mixture.loader(), replace(settings, refresh="never"))
    assert stale.stopped is not None
    assert "training accuracy fell" in stale.stopped
    kept = measure_information(teacher, mixture.loader())[0].summary()
    assert kept.accuracy == stale.after.accuracy > stale.before.accuracy - 0.2
    fresh = fine_tune(mixture.copy(), mixture.loader(), settings)
    assert fresh.stopped is None
    assert fresh.after.accuracy > stale.after.accuracy


def test_a_destructive_learning_rate_stops_and_the_healthy_weights_come_back(mixture: Any) -> None:
    teacher = mixture.copy()
    settings = replace(SETTINGS, optimiser=OptimiserSettings("sgd", 50.0, schedule="constant"))
    result = fine_tune_with_control(teacher, mixture.loader(), settings)
    assert result.mcmi.stopped is not None
    for name, tensor in mixture.teacher.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name
    assert any("stopped" in warning for warning in result.warnings)


def test_weights_that_the_last_step_of_an_epoch_made_infinite_stop_it_too(mixture: Any) -> None:
    """One batch is the whole epoch: its loss is finite, and only the pass that follows sees what it did."""
    teacher = mixture.copy()
    settings = replace(SETTINGS, optimiser=OptimiserSettings("sgd", 1e38, schedule="constant"), clip_norm=1e30)
    run = fine_tune(teacher, DataLoader(mixture.train, batch_size=800), settings)
    assert "NaN or infinite" in str(run.stopped)
    assert run.epochs == []
    for name, tensor in mixture.teacher.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name


def test_the_guard_names_what_went_wrong(mixture: Any) -> None:
    start = measure_information(mixture.teacher, mixture.loader())[0].summary()
    guard = CollapseGuard(start, GuardLimits())
    assert guard.step(0.1, 0.2) is None
    assert "nan" in (guard.step(float("nan"), 0.2) or "")
    assert "centroids" in (guard.step(0.1, 17.0) or "")
    assert guard.epoch(start) is None
    assert "accuracy fell" in (guard.epoch(replace(start, accuracy=start.accuracy - 0.25)) or "")
    assert "log-likelihood fell" in (guard.epoch(replace(start, log_likelihood=start.log_likelihood - 2)) or "")


def test_without_a_control_the_result_says_that_a_gain_cannot_be_told(mixture: Any) -> None:
    result = fine_tune_with_control(mixture.copy(), mixture.loader(), replace(SETTINGS, epochs=1), control=False)
    assert result.control is None
    assert "no control" in result.warnings[0]


def test_the_sweep_picks_on_validation_and_keeps_the_control(mixture: Any) -> None:
    before = {k: v.clone() for k, v in mixture.teacher.state_dict().items()}
    settings = replace(SETTINGS, epochs=3)
    result = sweep_strength(mixture.teacher, mixture.loader(), mixture.loader("validation"), [0.5, 0.25], settings)
    assert [point.strength for point in result.points] == [0.0, 0.25, 0.5]
    scores = {point.strength: point.score for point in result.points if point.score is not None}
    assert result.strength == max(scores, key=lambda s: scores[s])
    floor = result.control.run.validation.accuracy - 0.01
    for point in result.points:
        validation = point.run.validation
        assert (point.score is None) == (validation.accuracy < floor)
        assert point.score in (None, pytest.approx(validation.log_likelihood + validation.cmi))
    assert all(torch.equal(before[k], v) for k, v in mixture.teacher.state_dict().items())
    own = sweep_strength(
        mixture.teacher, mixture.loader(), mixture.loader("validation"), [0.25, 0.5], settings, score=lambda m: 1.0
    )
    assert own.strength == 0.0
    with pytest.raises(UsageError, match="none above 0"):
        sweep_strength(mixture.teacher, mixture.loader(), mixture.loader("validation"), [0.0])
