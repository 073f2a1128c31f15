# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.distill.data import Records
from calib.distill.networks import make_network
from calib.distill.protocols import (
    compare_cams,
    confusion_matrix,
    covered_area,
    eigen_cam,
    few_shot_conditions,
    shifted_and_flipped,
    temperature_study,
    without_classes,
    zero_shot_result,
)
from calib.distill.protocols.eigencam import save_cams
from calib.distill.task import ClassificationTask
from calib.errors import UsageError

RECORDS = Records(list(range(60)), tuple(n % 3 for n in range(60)), ("cat", "dog", "owl"), "test")


def test_few_shot_students_see_a_stratified_share_and_smaller_shares_are_nested() -> None:
    small, large = few_shot_conditions(RECORDS, [0.1, 0.5], seed=0)
    assert (small.name, small.per_class, len(small.records)) == ("10 %", 2, 6)
    assert set(small.records.inputs) < set(large.records.inputs)
    assert small.records.class_names == RECORDS.class_names


def test_omitted_classes_leave_the_data_and_keep_their_numbers() -> None:
    kept, omitted = without_classes(RECORDS, ["owl", 0])
    assert omitted == (0, 2)
    assert set(kept.labels) == {1}
    assert kept.class_names == RECORDS.class_names
    for wrong in (["bird"], [7], [], [0, 1, 2]):
        with pytest.raises(UsageError, match="omitted class"):
            without_classes(RECORDS, wrong)


def test_the_confusion_matrix_and_its_shares() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    predictions = torch.tensor([0, 1, 1, 1, 2, 0, 2])
    logits = torch.nn.functional.one_hot(predictions, 3).float()
    loader = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    assert confusion_matrix(torch.nn.Identity(), loader).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 2]]
    found = zero_shot_result(torch.nn.Identity(), loader, [2])
    assert found.omitted_recall == pytest.approx(2 / 3)
    assert found.kept_accuracy == pytest.approx(3 / 4)
    with pytest.raises(UsageError, match="no batch"):
        confusion_matrix(torch.nn.Identity(), [])


def test_eigen_cam_is_the_projection_on_the_first_singular_vector() -> None:
    a = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    found = eigen_cam(a).numpy()
    for n in range(3):
        rows = a[n].double().numpy().reshape(5, 24).T
        projected = rows @ np.linalg.svd(rows)[2][0]
        projected = projected if projected.sum() > 0 else -projected
        heat = np.maximum(projected, 0).reshape(4, 6)
        np.testing.assert_allclose(found[n], heat / heat.max(), rtol=1e-4, atol=1e-5)


def test_eigen_cam_finds_the_place_that_is_active_whatever_the_sign() -> None:
    a = torch.zeros(2, 4, 8, 8)
    a[0, :, 2:4, 2:4] = torch.tensor([1.0, -2.0, 3.0, 1.0])[:, None, None]
    a[1] = -a[0]
    maps = eigen_cam(a, (16, 16))
    assert maps.shape == (2, 16, 16)
    assert bool((maps[:, 4:8, 4:8] > 0.5).all())
    assert float(maps[:, 10:, 10:].abs().max()) == 0
    torch.testing.assert_close(covered_area(eigen_cam(a)), torch.tensor([4 / 64, 4 / 64]))
    assert not eigen_cam(torch.zeros(1, 2, 4, 4)).any()


def test_maps_of_two_teachers_are_compared_by_area_and_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]))
    teachers = {name: make_network("resnet8", 4).eval() for name in ("mll", "mcmi")}
    found = compare_cams(teachers, batch, ClassificationTask())
    assert found.maps["mll"].shape == (3, 32, 32)
    assert found.area["mcmi"] == pytest.approx(float(covered_area(found.maps["mcmi"]).mean()))
    assert 0 < found.area["mll"] < 1
    image = pytest.importorskip("PIL.Image")
    save_cams(tmp_path / "cams.png", batch[0], found, scale=2)
    assert image.open(tmp_path / "cams.png").size == (3 * 32 * 2, 3 * 32 * 2 + 18)  # names above
    vectors = make_network("mlp16", 4, channels=3, size=32)
    with pytest.raises(UsageError, match="no feature maps"):
        compare_cams({"mlp": vectors}, batch, ClassificationTask())


def test_the_temperature_study_measures_each_teacher_at_each_temperature(mixture: Any) -> None:
    points = temperature_study({"mll": mixture.teacher}, mixture.loader(), (1.0, 4.0, 1e4))
    assert [point.temperature for point in points] == [1.0, 4.0, 1e4]
    assert points[0].cmi > points[2].cmi
    assert points[0].ncmi is not None


def test_augmented_images_are_shifted_or_flipped_copies() -> None:
    torch.manual_seed(0)
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(50, 1, 1, 1) + 1
    labels = torch.arange(50)
    found, same = shifted_and_flipped((images, labels))
    assert torch.equal(same, labels)
    allowed = set()
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    for top in range(3):
        for left in range(3):
            crop = padded[top : top + 8, left : left + 8]
            allowed |= {tuple(crop.flatten().tolist()), tuple(crop.flip(1).flatten().tolist())}
    seen = {tuple(one.flatten().tolist()) for one in found}
    assert seen <= allowed
    assert len(seen) > 10
