# SPDX-License-Identifier: Apache-2.0
"""Each loss against its published formula, written out in numpy loops."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from calib.distill.features import View
from calib.distill.frameworks import FRAMEWORKS, make_framework, soft_targets
from calib.distill.frameworks.framework import paired_maps
from calib.distill.frameworks.logits import decoupled_loss
from calib.errors import UsageError

N, C = 6, 5


def view(seed: int, width: int, channels: tuple[int, ...] = (4, 6), sizes: tuple[int, ...] = (8, 4)) -> View:
    g = torch.Generator().manual_seed(seed)
    return View(
        logits=2 * torch.randn(N, C, generator=g),
        labels=torch.arange(N) % C,
        maps=tuple(torch.randn(N, c, s, s, generator=g) for c, s in zip(channels, sizes, strict=True)),
        embedding=torch.randn(N, width, generator=g),
        index=torch.arange(N),
    )


STUDENT, TEACHER = view(0, 7), view(1, 9, channels=(5, 8))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numbers(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy()


def feature_loss(name: str) -> float:
    torch.manual_seed(0)
    return float(make_framework(name, STUDENT, TEACHER, 40).feature_loss(STUDENT, TEACHER).detach())


def cross_entropy() -> float:
    p = softmax(numbers(STUDENT.logits))
    return float(-np.mean([math.log(p[n, int(STUDENT.labels[n])]) for n in range(N)]))


def test_kd_is_a_tenth_of_cross_entropy_and_nine_tenths_of_soft_targets() -> None:
    s, t = softmax(numbers(STUDENT.logits) / 4), softmax(numbers(TEACHER.logits) / 4)
    divergence = float(np.mean(np.sum(t * np.log(t / s), axis=1)))
    assert float(soft_targets(STUDENT.logits, TEACHER.logits, 4.0)) == pytest.approx(16 * divergence, rel=1e-5)
    found = float(make_framework("kd", STUDENT, TEACHER, 40)(STUDENT, TEACHER))
    assert found == pytest.approx(0.1 * cross_entropy() + 0.9 * 16 * divergence, rel=1e-5)


def test_kd_is_that_of_torchdistill() -> None:
    from torchdistill.losses.mid_level import KDLoss

    theirs = KDLoss("l", "output", "l", "output", temperature=4.0, alpha=0.1, beta=0.9)
    expected = theirs({"l": {"output": STUDENT.logits}}, {"l": {"output": TEACHER.logits}}, STUDENT.labels)
    found = make_framework("kd", STUDENT, TEACHER, 40)(STUDENT, TEACHER)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_ce_is_cross_entropy_alone() -> None:
    found = float(make_framework("ce", STUDENT, TEACHER, 40)(STUDENT, TEACHER))
    assert found == pytest.approx(cross_entropy(), rel=1e-5)


def test_dkd_is_target_class_plus_eight_times_the_others() -> None:
    s, t, total = softmax(numbers(STUDENT.logits) / 4), softmax(numbers(TEACHER.logits) / 4), 0.0
    for n in range(N):
        y = int(STUDENT.labels[n])
        bt, bs = np.array([t[n, y], 1 - t[n, y]]), np.array([s[n, y], 1 - s[n, y]])
        qt, qs = np.delete(t[n], y) / (1 - t[n, y]), np.delete(s[n], y) / (1 - s[n, y])
        total += np.sum(bt * np.log(bt / bs)) + 8 * np.sum(qt * np.log(qt / qs))
    assert feature_loss("dkd") == pytest.approx(16 * total / N, rel=1e-5)


def test_kd_is_the_target_class_plus_the_others_times_the_teachers_doubt() -> None:
    # eq. 6 of the DKD paper, sample by sample
    for n in range(N):
        s, t, y = STUDENT.logits[n : n + 1], TEACHER.logits[n : n + 1], STUDENT.labels[n : n + 1]
        doubt = 1 - float(torch.softmax(t / 4, 1)[0, y])
        assert float(decoupled_loss(s, t, y, 1.0, doubt, 4.0)) == pytest.approx(
            float(soft_targets(s, t, 4.0)), rel=1e-4
        )


def test_at_is_the_mean_square_between_normalised_attention_maps() -> None:
    total = 0.0
    for mine, theirs in zip(STUDENT.maps, TEACHER.maps, strict=True):
        rows = []
        for side in (numbers(mine), numbers(theirs)):
            attention = (side**2).mean(1).reshape(N, -1)
            rows.append(attention / np.linalg.norm(attention, axis=1, keepdims=True))
        total += float(np.mean((rows[0] - rows[1]) ** 2))
    assert feature_loss("at") == pytest.approx(total, rel=1e-5)


def test_pkt_is_the_divergence_between_cosine_similarities() -> None:
    probabilities = []
    for side in (numbers(STUDENT.embedding), numbers(TEACHER.embedding)):
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        cosine = (unit @ unit.T + 1) / 2
        probabilities.append(cosine / cosine.sum(1, keepdims=True))
    s, t = probabilities
    assert feature_loss("pkt") == pytest.approx(float(np.mean(t * np.log(t / s))), rel=1e-3)


def test_sp_is_the_distance_of_gram_matrices_with_rows_of_euclidean_length_one() -> None:
    grams = []
    for side in (numbers(STUDENT.maps[-1]), numbers(TEACHER.maps[-1])):
        flat = side.reshape(N, -1)
        gram = flat @ flat.T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    assert feature_loss("sp") == pytest.approx(float(np.sum((grams[0] - grams[1]) ** 2)) / N**2, rel=1e-5)


def test_cc_is_the_mean_square_between_series_of_the_gaussian_kernel() -> None:
    torch.manual_seed(0)
    framework = make_framework("cc", STUDENT, TEACHER, 40)
    matrices = []
    for layer, side in ((framework.student_layer, STUDENT), (framework.teacher_layer, TEACHER)):
        unit = numbers(layer(side.embedding))
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        kernel = np.zeros((N, N))
        for p in range(3):
            kernel += math.exp(-0.8) * 0.8**p / math.factorial(p) * (unit @ unit.T) ** p
        matrices.append(kernel)
    expected = float(np.sum((matrices[0] - matrices[1]) ** 2)) / N**2
    assert float(framework.feature_loss(STUDENT, TEACHER).detach()) == pytest.approx(expected, rel=1e-4)


def huber(x: np.ndarray) -> float:
    return float(np.mean(np.where(np.abs(x) <= 1, 0.5 * x**2, np.abs(x) - 0.5)))


def test_rkd_is_the_huber_loss_of_distances_and_angles() -> None:
    distances, angles = [], []
    for side in (numbers(STUDENT.embedding), numbers(TEACHER.embedding)):
        d = np.array([[np.linalg.norm(a - b) for b in side] for a in side])
        distances.append(d / d[d > 0].mean())
        cosines = np.zeros((N, N, N))
        for j in range(N):
            for i in range(N):
                for k in range(N):
                    a, b = side[i] - side[j], side[k] - side[j]
                    if j not in (i, k):
                        cosines[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angles.append(cosines)
    expected = 25 * huber(distances[0] - distances[1]) + 50 * huber(angles[0] - angles[1])
    assert feature_loss("rkd") == pytest.approx(expected, rel=1e-4)


def test_vid_is_the_gaussian_likelihood_of_the_teachers_maps() -> None:
    torch.manual_seed(0)
    framework = make_framework("vid", STUDENT, TEACHER, 40)
    with torch.no_grad():
        for layer in framework.regressors:
            layer.rho.add_(torch.randn_like(layer.rho))
    total = 0.0
    for layer, mine, theirs in zip(framework.regressors, STUDENT.maps, TEACHER.maps, strict=True):
        mean, variance = numbers(layer.mean(mine)), np.log1p(np.exp(numbers(layer.rho))) + 1e-5
        total += float(np.mean(0.5 * ((numbers(theirs) - mean) ** 2 / variance + np.log(variance))))
    assert float(framework.feature_loss(STUDENT, TEACHER).detach()) == pytest.approx(total, rel=1e-5)
    fresh = make_framework("vid", STUDENT, TEACHER, 40).regressors[0]
    assert float(fresh(STUDENT.maps[0])[1].detach().mean()) == pytest.approx(5.0, rel=1e-4)


def test_crd_is_the_contrast_of_the_positive_with_drawn_negatives() -> None:
    torch.manual_seed(0)
    samples = 40
    framework = make_framework("crd", STUDENT, TEACHER, samples)
    assert framework.negatives == samples
    memories = {"s": numbers(framework.loss.memory_v1).copy(), "t": numbers(framework.loss.memory_v2).copy()}
    s, t = numbers(framework.student_layer(STUDENT.embedding)), numbers(framework.teacher_layer(TEACHER.embedding))
    s, t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (s, t))
    torch.manual_seed(1)
    found = float(framework.feature_loss(STUDENT, TEACHER).detach())
    torch.manual_seed(1)
    drawn = torch.randint(samples, (N, samples + 1)).numpy()
    drawn[:, 0] = np.arange(N)
    total = 0.0
    for anchor, memory in ((s, memories["t"]), (t, memories["s"])):
        scores = np.array([[math.exp(memory[j] @ anchor[n] / 0.07) for j in drawn[n]] for n in range(N)])
        scores /= scores.mean() * samples  # the normalisation constant, estimated on the first batch
        noise = samples * (1 / samples)  # negatives per positive times the noise probability of each
        total -= np.log(scores[:, 0] / (scores[:, 0] + noise)).sum() / N
        total -= np.log(noise / (scores[:, 1:] + noise)).sum() / N
    assert found == pytest.approx(float(total), rel=1e-4)
    moved = numbers(framework.loss.memory_v1)[:N]
    expected = 0.5 * memories["s"][:N] + 0.5 * s
    np.testing.assert_allclose(moved, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    assert not framework.loss.params.requires_grad


def test_reviewkd_fuses_by_attention_and_compares_at_several_scales() -> None:
    torch.manual_seed(0)
    framework = make_framework("reviewkd", STUDENT, TEACHER, 40).eval()
    shallow, deep = framework.fusions
    with torch.no_grad():
        x1 = deep.reduce(STUDENT.maps[1])
        x0 = shallow.reduce(STUDENT.maps[0])
        enlarged = x1.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        weights = torch.sigmoid(shallow.attention[0](torch.cat([x0, enlarged], 1)))
        fused = x0 * weights[:, 0:1] + enlarged * weights[:, 1:2]
        compared = [shallow.expand(fused), deep.expand(x1)]
        found = float(framework.feature_loss(STUDENT, TEACHER))
    total = 0.0
    for mine, theirs in zip(compared, TEACHER.maps, strict=True):
        size = mine.shape[2]
        terms, scales = [float(np.mean((numbers(mine) - numbers(theirs)) ** 2))], [1.0]
        for side in (4, 2, 1):
            if side < size:
                pooled = [
                    numbers(m).reshape(N, m.shape[1], side, size // side, side, size // side).mean((3, 5))
                    for m in (mine, theirs)
                ]
                scales.append(scales[-1] / 2)
                terms.append(scales[-1] * float(np.mean((pooled[0] - pooled[1]) ** 2)))
        total += sum(terms) / sum(scales)
    assert found == pytest.approx(total, rel=1e-4)


def test_hsakd_matches_joint_distributions_on_every_map_and_the_logits_of_all_rotations() -> None:
    g = torch.Generator().manual_seed(3)

    def turned(seed: int, channels: tuple[int, ...]) -> View:
        plain = view(seed, 7, channels)
        return View(
            torch.randn(4 * N, C, generator=g),
            plain.labels.repeat_interleave(4),
            tuple(torch.randn(4 * N, *m.shape[1:], generator=g) for m in plain.maps),
        )

    student, teacher = turned(0, (4, 6)), turned(1, (5, 8))
    torch.manual_seed(0)
    framework = make_framework("hsakd", student, teacher, 40).eval()

    def divergence(mine: torch.Tensor, theirs: torch.Tensor) -> float:
        s, t = softmax(numbers(mine) / 3), softmax(numbers(theirs) / 3)
        return 9 * float(np.mean(np.sum(t * np.log(t / s), axis=1)))

    expected = divergence(student.logits, teacher.logits)
    layers = zip(framework.student_classifiers, framework.teacher_classifiers, strict=True)
    for (mine, theirs), s, t in zip(layers, student.maps, teacher.maps, strict=True):
        assert mine(s).shape == (4 * N, 4 * C)
        expected += divergence(mine(s), theirs(t))
    upright = softmax(numbers(student.logits))[::4]
    expected -= float(np.mean([math.log(upright[n, int(student.labels[4 * n])]) for n in range(N)]))
    assert float(framework(student, teacher).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(FRAMEWORKS) - {"ce", "hsakd"}))
def test_a_student_that_equals_its_teacher_has_nothing_left_to_match(name: str) -> None:
    torch.manual_seed(0)
    framework = make_framework(name, STUDENT, STUDENT, 40)
    if name == "cc":
        framework.teacher_layer = framework.student_layer
    if name in ("vid", "crd", "reviewkd"):  # their own parameters stand between the two
        assert float(framework.feature_loss(STUDENT, STUDENT).detach()) != 0
        return
    kept = framework.weights
    loss = float(framework(STUDENT, STUDENT)) - kept.cross_entropy * cross_entropy()
    assert loss == pytest.approx(0.0, abs=1e-3)


def test_maps_of_other_resolutions_are_averaged_to_the_smaller() -> None:
    small = view(2, 7, sizes=(8, 2))
    pairs = paired_maps(STUDENT, small)
    assert [tuple(m.shape[2:]) for pair in pairs for m in pair] == [(8, 8), (8, 8), (2, 2), (2, 2)]
    np.testing.assert_allclose(
        numbers(pairs[1][0]), numbers(STUDENT.maps[1]).reshape(N, 6, 2, 2, 2, 2).mean((3, 5)), rtol=1e-5, atol=1e-6
    )


def test_what_a_framework_needs_and_does_not_get_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = View(STUDENT.logits, STUDENT.labels)
    with pytest.raises(UsageError, match="embeddings"):
        make_framework("pkt", bare, TEACHER, 40)
    with pytest.raises(UsageError, match="feature maps"):
        make_framework("at", bare, TEACHER, 40)
    with pytest.raises(UsageError, match="classes"):
        make_framework("kd", View(torch.zeros(2, 3), torch.zeros(2).long()), TEACHER, 40)
    with pytest.raises(UsageError, match="choose one of ce, kd"):
        make_framework("xyz", STUDENT, TEACHER, 40)
    sequence = View(STUDENT.logits, STUDENT.labels, (torch.randn(N, 4, 9, 1),), STUDENT.embedding)
    with pytest.raises(UsageError, match="images"):
        make_framework("reviewkd", sequence, TEACHER, 40)
    with pytest.raises(UsageError, match="number of each sample"):
        make_framework("crd", View(STUDENT.logits, STUDENT.labels, embedding=STUDENT.embedding), TEACHER, 40)
    monkeypatch.setitem(sys.modules, "torchdistill.losses.mid_level", None)
    with pytest.raises(UsageError, match=r"pip install 'calib\[distill\]'.*--no-deps torchdistill"):
        make_framework("rkd", STUDENT, TEACHER, 40)


def test_given_weights_replace_the_frameworks_own() -> None:
    framework = make_framework("at", STUDENT, TEACHER, 40, feature=10.0, temperature=2.0, cross_entropy=None)
    assert (framework.weights.cross_entropy, framework.weights.feature, framework.weights.temperature) == (1, 10, 2)
    framework = make_framework("dkd", STUDENT, TEACHER, 40)
    framework.progress = 1 / 24
    assert framework.feature_weight == pytest.approx(0.5)
