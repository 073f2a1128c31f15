# SPDX-License-Identifier: Apache-2.0
"""INT8 beyond language models: a sentence encoder and a convolutional network, weights per row, inputs per tensor.

`python benchmarks/quality_others.py [minilm | efficientnet]` writes `results/quality_others.json`; named alone, a part
leaves the other one as it is there.

all-MiniLM-L6-v2: topics of 400 Reuters-R8 documents by a linear probe that was trained on float embeddings of 800
others, and the cosine of each embedding to the one in float. Ranges from 256 of the 800; what is kept in float is
chosen on 48 of them. The share of channels that the cure `scale` leaves alone, 0.9, was chosen on 160 of the 400, so
its rows also have the cosine on texts that decided nothing: the 544 documents that ranges are not from, and blocks of
the built-in corpus. EfficientNet-Lite0, batch norms folded: 22 photos in two halves, each evaluated with ranges,
compensation and choice of layers from ten views of every photo of the other half: no photo is calibrated on itself.

Targets: accuracy drop <= 0.3 points and cosine >= 0.999; the same top-1 on all photos and logits SQNR >= 25 dB. A row
says whether it meets them and whether it needs an operation while the model runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import fetch
from photos import efficientnet, photos, tensor, views
from results_file import RESULTS, environment, write
from reuters import Probe, batches, pooled, topics, write_tokens
from torch import nn

from calib.corpus import TokenBlocks, build_blocks
from calib.cures import OnlineRotation, SmoothingSweep, find_pairs
from calib.cures.ranges import smoothed_ranges
from calib.cures.scale import OnlineScaling
from calib.errors import CalibError
from calib.evaluation.classification import collect, compare_classes, compare_embeddings
from calib.evaluation.layers import layer_errors
from calib.measurement import Calibration, Measurement
from calib.measurement.engine import measure
from calib.models import OpenedModel, open_model
from calib.quantized import IntegerGrid, QuantizationPlan, QuantizedModel, plan_from_scales
from calib.quantized.convolutions import collect_patch_hessians, compensated_convolutions
from calib.quantized.hessian import collect_hessians, compensated
from calib.quantized.quantizers import StaticQuantizer, TensorQuantizer
from calib.scales import choose_scales

ALPHAS = (0.5, 0.8)
CALIBRATED, CHOSEN_ON, HESSIAN_BATCHES = 256, 48, 20
LARGEST_DROP, LEAST_COSINE, LEAST_SQNR_DB = 0.003, 0.999, 25.0


def main() -> None:
    torch.manual_seed(0)
    parts = {"minilm": ("all-MiniLM-L6-v2", minilm), "efficientnet": ("EfficientNet-Lite0", convolutional)}
    chosen = sys.argv[1:] or list(parts)
    if not set(chosen) <= set(parts):
        sys.exit(f"quality_others: no part {' '.join(chosen)}; choose of {', '.join(parts)}")
    before = json.loads((RESULTS / "quality_others.json").read_text())
    of_before = {key: before[key] for key in environment()}
    results = {}
    for name, (title, make) in parts.items():
        results[title] = {**environment(), **make()} if name in chosen else {**of_before, **before[title]}
    write("quality_others", results)


class Encoder:
    """MiniLM, its documents, and what it says of them in float."""

    def __init__(self) -> None:
        self.opened: OpenedModel = open_model(fetch("minilm"), device="cpu")
        self.model = self.opened.model
        train, test = topics()
        tokenizer = self.opened.tokenizer
        self.train, order = batches(tokenizer, train.texts)
        self.test, test_order = batches(tokenizer, test.texts)
        self.few, _ = batches(tokenizer, train.texts[:CHOSEN_ON])
        self.labels = test.labels[test_order]
        self.probe = Probe(collect(self.model, self.train, pooled), train.labels[order])
        self.exact = collect(self.model, self.test, pooled)
        self.exact_few = collect(self.model, self.few, pooled)
        self.blocks = self._blocks(train.texts[:CALIBRATED])
        self.calibration, _ = batches(tokenizer, train.texts[:CALIBRATED])
        others, _ = batches(tokenizer, train.texts[CALIBRATED:])
        builtin = torch.from_numpy(build_blocks([], tokenizer, samples=64, max_length=128, seed=7).input_ids).split(16)
        self.elsewhere = {
            "other Reuters documents": others,
            "built-in corpus": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in builtin],
        }
        self.rows: dict[str, Any] = {}

    def _blocks(self, texts: list[str]) -> TokenBlocks:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reuters.jsonl"
            write_tokens(self.opened.tokenizer, texts, path)
            return build_blocks([str(path)], None, samples=len(texts), max_length=128, layout="documents")

    def row(self, label: str, plan: QuantizationPlan, **more: Any) -> None:
        """Evaluates a plan on the test documents."""
        with QuantizedModel(self.model, plan) as quantized:
            found = collect(self.model, self.test, pooled)
        assert not quantized.silent()
        cosine = compare_embeddings(found, self.exact)
        topic = compare_classes(self.probe.logits(found), self.probe.logits(self.exact), self.labels)
        assert topic.accuracy is not None
        assert topic.float_accuracy is not None
        assert topic.difference is not None
        self.rows[label] = {
            "accuracy": topic.accuracy,
            "accuracy_minus_float": interval(topic.difference),
            "cosine": interval(cosine.cosine, 6),
            "smallest_cosine": round(cosine.smallest_cosine, 6),
            "embedding_sqnr_db": rounded(cosine.sqnr_db),
            "meets_accuracy": topic.float_accuracy - topic.accuracy <= LARGEST_DROP,
            "meets_cosine": cosine.cosine.value >= LEAST_COSINE,
            **more,
        }
        print(label, self.rows[label], flush=True)

    def worth(self, plan: QuantizationPlan) -> float:
        """Mean cosine on the documents that decisions are made on."""
        with QuantizedModel(self.model, plan):
            return compare_embeddings(collect(self.model, self.few, pooled), self.exact_few).cosine.value

    def cosine_elsewhere(self, plan: QuantizationPlan) -> dict[str, Any]:
        """Cosine on texts that decided nothing."""
        found = {}
        for name, some in self.elsewhere.items():
            exact = collect(self.model, some, pooled)
            with QuantizedModel(self.model, plan):
                compared = compare_embeddings(collect(self.model, some, pooled), exact)
            found[name] = {"texts": compared.items, **interval(compared.cosine, 6)}
        return found

    def compensated_on_calibration(self, plan: QuantizationPlan) -> QuantizationPlan:
        """The plan with error-compensated weights, over all that ranges are from, as `calib quantize` does it."""
        with torch.no_grad(), collect_hessians(self.model, plan.weights) as hessians:
            for batch in self.calibration:
                self.model(**batch)
        return compensated(plan, self.model, hessians, order="activation")

    def compensated(self, plan: QuantizationPlan) -> QuantizationPlan:
        """The plan with error-compensated weights."""
        with torch.no_grad(), collect_hessians(self.model, plan.weights) as hessians:
            for batch in self.train[:HESSIAN_BATCHES]:
                self.model(**batch)
        return compensated(plan, self.model, hessians)


def minilm() -> dict[str, Any]:
    encoder = Encoder()
    model = encoder.model
    measurement = measure(encoder.opened, encoder.blocks)
    symmetric, asymmetric = choose_scales(measurement), choose_scales(measurement, symmetric=False)
    encoder.row("weights only", plan_from_scales(model, symmetric, inputs="none"))
    encoder.row("dynamic per-token", plan_from_scales(model, symmetric, inputs="dynamic-per-token"))
    encoder.row("static", plan_from_scales(model, symmetric))
    pairs = find_pairs(model)
    sweep = SmoothingSweep(pairs, measurement)
    for alpha in ALPHAS:
        smoothing = sweep.smoothing(alpha)
        with smoothing.apply(model):
            plan = plan_from_scales(model, choose_scales(smoothed_ranges(measurement, smoothing)))
            # scales of weights are in the file of the float model: those of the smoothed ones follow from themselves
            plan = plan.with_weights(plan_from_scales(model, inputs="none").weights)
            encoder.row(f"static, smoothing {alpha}", plan, smoothed=[pair.name for pair in pairs])
    encoder.row("static, asymmetric", plan_from_scales(model, asymmetric))
    plan = plan_from_scales(model, asymmetric)
    kept = keep_two(encoder, plan)
    encoder.row("static, asymmetric, 2 kept in float", plan.without(dict.fromkeys(kept, "kept")), kept=kept)
    encoder.row("static, asymmetric, compensated weights", encoder.compensated(plan))
    rotation = OnlineRotation(tuple(plan.weights))
    with rotation.apply(model):
        rotated = measure(encoder.opened, encoder.blocks)
        online = {"needs": "a Hadamard rotation in front of every linear layer, as the model runs"}
        encoder.row("static, rotated inputs", plan_from_scales(model, choose_scales(rotated)), **online)
        plan = plan_from_scales(model, choose_scales(rotated, symmetric=False))
        label = "static, asymmetric, rotated inputs, compensated weights"
        encoder.row(label, encoder.compensated(plan), **online)
    scaled_rows(encoder, measurement)
    errors = layer_errors(model, encoder.test[:2], plan_from_scales(model, symmetric), scales=symmetric)
    float_accuracy = float((encoder.probe.logits(encoder.exact).argmax(-1) == encoder.labels).mean())
    return {
        "float_accuracy": float_accuracy,
        "documents": {"train": 800, "test": len(encoder.labels), "calibration": CALIBRATED},
        "targets": {"largest_accuracy_drop": LARGEST_DROP, "least_cosine": LEAST_COSINE},
        "smoothing_skipped": dict(pairs.skipped),
        "rows": encoder.rows,
        "static_expected_against_measured": {
            "median_difference_db": rounded(errors.median_difference_db),
            "beyond_0.5_db": {t.name: rounded(t.difference_db) for t in errors.disagreements()},
            "tensors": sum(t.difference_db is not None for t in errors.tensors.values()),
        },
    }


def scaled_rows(encoder: Encoder, measurement: Measurement) -> None:
    """Loud channels brought down in front of the layers that smoothing cannot reach."""
    model = encoder.model
    reached = {consumer.module for pair in find_pairs(model) for consumer in pair.consumers}
    linear = set(plan_from_scales(model, inputs="none").weights)
    scaling = OnlineScaling.find(model, measurement, linear - reached)
    with scaling.apply(model):
        plan = plan_from_scales(model, choose_scales(measure(encoder.opened, encoder.blocks), symmetric=False))
        online = {"needs": "a product in front of these layers, which ONNX and OpenVINO graphs hold"}
        online |= {"layers": len(scaling.factors), "summary": scaling.record().summary}
        encoder.row("static, asymmetric, scaled inputs", plan, **online, elsewhere=encoder.cosine_elsewhere(plan))
        plan = encoder.compensated_on_calibration(plan)
        label = "static, asymmetric, scaled inputs, compensated weights"
        encoder.row(label, plan, **online, elsewhere=encoder.cosine_elsewhere(plan))


def keep_two(encoder: Encoder, plan: QuantizationPlan) -> list[str]:
    """Two layers, one after the other, without whose rounding the mean cosine is best; of the twelve of the MLPs."""
    shortlist = [name for name in plan.weights if name.endswith(("intermediate.dense", "output.dense"))]
    shortlist = [name for name in shortlist if ".attention." not in name]
    kept: list[str] = []
    for _ in range(2):
        left = [name for name in shortlist if name not in kept]
        kept.append(max(left, key=lambda n: encoder.worth(plan.without(dict.fromkeys([*kept, n], "kept")))))
    return kept


def convolutional() -> dict[str, Any]:
    model = efficientnet()
    images = photos()
    names = list(images)
    halves = [[images[name] for name in names[start::2]] for start in (0, 1)]
    order = names[0::2] + names[1::2]
    calibration = halves[::-1]
    exact = np.concatenate([outputs(model, half) for half in halves])
    ranges = [seen(model, half) for half in calibration]
    static = [planned(model, found, symmetric=False) for found in ranges]
    compensated_plans = [compensated_for(model, plan, half) for plan, half in zip(static, calibration, strict=True)]
    kept = [loudest(model, half, plan) for plan, half in zip(compensated_plans, calibration, strict=True)]
    forms = {
        "weights only": [plan_from_scales(model, inputs="none")] * 2,
        "weights only, compensated": [replace(plan, inputs={}) for plan in compensated_plans],
        "dynamic per-tensor": [plan_from_scales(model, inputs="dynamic-per-token")] * 2,
        "static": [planned(model, found, symmetric=True) for found in ranges],
        "static, asymmetric": static,
        "static, asymmetric, compensated": compensated_plans,
        "static, asymmetric, compensated, 2 kept in float": [
            plan.without(dict.fromkeys(two, "kept")) for plan, two in zip(compensated_plans, kept, strict=True)
        ],
    }
    rows = {}
    for label, plans in forms.items():
        parts = []
        for half, plan in zip(halves, plans, strict=True):
            with QuantizedModel(model, plan) as quantized:
                parts.append(outputs(model, half))
            assert not quantized.silent()
        found = np.concatenate(parts)
        sqnr = compare_classes(found, exact).sqnr_db
        top, other = exact.argmax(-1), found.argmax(-1)
        rows[label] = {
            "same_top1": int((top == other).sum()),
            "other_top1": {n: [int(a), int(b)] for n, a, b in zip(order, top, other, strict=True) if a != b},
            "logits_sqnr_db": rounded(sqnr),
            "meets_top1": bool((top == other).all()),
            "meets_sqnr": sqnr is None or sqnr >= LEAST_SQNR_DB,
            **({"kept_by_half": kept} if "kept" in label else {}),
        }
        print(label, rows[label], flush=True)
    second, first = np.sort(exact, -1)[:, -2:].T
    return {
        "photos": len(names),
        "layers": len(static[0].weights),
        "targets": {"top1": "the same on all photos", "least_logits_sqnr_db": LEAST_SQNR_DB},
        "float_margin": {n: round(float(a - b), 3) for n, a, b in zip(order, first, second, strict=True)},
        "smoothing": pairs_or_reason(model),
        "rows": rows,
    }


def compensated_for(model: nn.Module, plan: QuantizationPlan, images: Sequence[Any]) -> QuantizationPlan:
    """The plan with error-compensated weights, against float inputs over ten views of each photo."""
    convolutions = [n for n in plan.weights if isinstance(model.get_submodule(n), nn.Conv2d)]
    linear = [n for n in plan.weights if n not in convolutions]
    with collect_patch_hessians(model, convolutions) as patches, collect_hessians(model, linear) as hessians:
        for image in images:
            for view in views(image):
                model(view)
    plan = compensated_convolutions(plan, model, patches, order="activation")
    return compensated(plan, model, hessians, order="activation")


def seen(model: nn.Module, images: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Range of every tensor over ten views of each photo, under all of its names."""
    with torch.no_grad(), Calibration(model) as calibration:
        for image in images:
            for view in views(image):
                model(view)
    found = {}
    for site in calibration.sites().values():
        for name in [site.name, *site.aliases]:
            found[name] = (float(site.statistics.range.min), float(site.statistics.range.max))
    return found


def planned(model: nn.Module, ranges: dict[str, tuple[float, float]], *, symmetric: bool) -> QuantizationPlan:
    """Static plan of all convolutions and the classifier: absmax, or min to max."""
    grid = IntegerGrid.of(8, symmetric=symmetric)
    plan = plan_from_scales(model, inputs="none")
    inputs: dict[str, TensorQuantizer] = {}
    for name in plan.weights:
        low, high = ranges[f"{name}:input"]
        scale, point = grid.step(torch.tensor(low), torch.tensor(high))
        first = isinstance(model.get_submodule(name), nn.Conv2d)
        inputs[name] = StaticQuantizer(grid, scale, point, "channels_first" if first else "tokens")
    return replace(plan, inputs=inputs)


def outputs(model: nn.Module, images: Sequence[Any]) -> Any:
    return collect(model, [tensor(image) for image in images], lambda output, batch: output)


def loudest(model: nn.Module, images: Sequence[Any], plan: QuantizationPlan) -> list[str]:
    """The two layers without whose rounding the logits of some photos are closest, one after the other."""
    exact = outputs(model, images)
    kept: list[str] = []

    def sqnr(names: list[str]) -> float:
        with QuantizedModel(model, plan.without(dict.fromkeys(names, "kept"))):
            return compare_classes(outputs(model, images), exact).sqnr_db or np.inf

    for _ in range(2):
        kept.append(max((n for n in plan.weights if n not in kept), key=lambda n: sqnr([*kept, n])))
    return kept


def pairs_or_reason(model: nn.Module) -> dict[str, Any]:
    """Whether smoothing applies to a convolutional network."""
    try:
        pairs = find_pairs(model)
    except CalibError as error:
        return {"pairs": 0, "reason": " ".join(str(error).split())}
    return {"pairs": len(pairs), "skipped": dict(list(pairs.skipped.items())[:3])}


def interval(found: Any, digits: int = 4) -> dict[str, float]:
    return {key: round(value, digits) for key, value in asdict(found).items()}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


if __name__ == "__main__":
    main()
