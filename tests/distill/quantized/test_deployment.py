# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calib.distill.encoder import EncoderClassifier
from calib.distill.networks import make_network
from calib.distill.quantized.deployment import deploy, measure_classifier, worst_peaks
from calib.distill.quantized.latency import first_input, latency_or_reason, measure_latency
from calib.distill.task import ClassificationTask
from calib.quantized import QuantizedModel, plan_from_scales


def test_a_deployment_counts_what_the_quantized_model_gets_right(mixture: Any) -> None:
    model, test = mixture.copy(), mixture.loader("validation", shuffle=False)
    found = deploy(model, ClassificationTask(), mixture.loader(), test)
    record = found.record
    inputs, labels, _ = mixture.validation.tensors
    with torch.no_grad(), QuantizedModel(model, plan_from_scales(model, found.scales)):
        right = float((model(inputs).argmax(1) == labels).float().mean())
    assert record.quantized[0].accuracy == pytest.approx(right)
    assert [(q.weight_bits, q.activation_bits, q.scales) for q in record.quantized] == [
        (8, 8, "measured"),
        (4, 8, "measured"),
    ]
    assert record.accuracy == pytest.approx(float((model(inputs).argmax(1) == labels).float().mean()))
    weights = [p.numel() for n, p in model.named_parameters() if n.endswith("weight")]
    rows, rest = 64 + 64 + 10, 64 + 64 + 10
    assert record.float_bytes == 4 * (sum(weights) + rest)
    assert record.bytes_by_weight_bits == {
        "8": sum(weights) + 4 * (rows + rest),
        "4": sum(weights) // 2 + 4 * (rows + rest),
    }


def test_peaks_are_the_largest_over_the_calibration_data(mixture: Any) -> None:
    model = mixture.copy()
    measurement = measure_classifier(model, ClassificationTask(), mixture.loader(shuffle=False), "m")
    hidden = torch.relu(model[0](mixture.train.tensors[0])).detach()
    found = {peak.site: peak for peak in worst_peaks(measurement, 100)}
    site = found["2:input"] if "2:input" in found else found["1:output"]
    assert site.peak_over_rms == pytest.approx(float(hidden.abs().max() / hidden.square().mean().sqrt()), rel=1e-5)
    ratios = [peak.peak_over_rms for peak in found.values()]
    assert ratios == sorted(ratios, reverse=True)


def test_a_text_student_is_timed_in_onnx_runtime_beside_its_teacher(minilm_like: Path) -> None:
    pytest.importorskip("onnxruntime")
    from calib.models import open_model

    opened = open_model(minilm_like, task="feature-extraction", device="cpu")
    model: nn.Module = EncoderClassifier(opened.model, 3).eval()
    ids = torch.randint(4, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    found = deploy(model, ClassificationTask(), [batch], [batch])
    latency = measure_latency(model, found.scales, first_input(batch), teacher=model, pairs=3)
    assert latency.float_ms > 0
    assert latency.teacher_ms is not None
    assert latency.teacher_ms > 0
    # the head reads one row per text, a product that the exporter leaves in float
    assert latency.integer_layers == len(plan_from_scales(model, inputs="none").weights) - 1


def images(network: str, size: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network(network, 3, channels=1, size=size).eval()
        return model, (torch.randn(6, 1, size, size), torch.tensor([0, 1, 2] * 2))


def test_an_image_student_is_timed_with_the_layers_that_compute_in_integers() -> None:
    pytest.importorskip("onnxruntime")
    model, batch = images("vit_micro", 16)
    teacher, _ = images("resnet8", 16)
    found = deploy(model, ClassificationTask(), [batch], [batch])
    latency = measure_latency(model, found.scales, first_input(batch), teacher=teacher, pairs=3)
    assert latency.layers == 26
    assert latency.integer_layers == 25  # all but the convolution that makes the patches
    assert latency.teacher_ms is not None
    assert latency.teacher_ms > 0


def test_what_cannot_be_exported_has_a_reason_instead_of_a_latency(mixture: Any) -> None:
    pytest.importorskip("onnxruntime")

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)

    batch = mixture.train[:8]
    found = deploy(Branches(), ClassificationTask(), [batch], [batch])
    latency, reason = latency_or_reason(Branches(), found.scales, first_input(batch))
    assert latency is None
    assert "torch cannot export it to ONNX" in str(reason)
