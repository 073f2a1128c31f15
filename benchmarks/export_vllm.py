# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 as a static INT8 checkpoint in vLLM on the CPU, against calib's quantized model on the exported scales.

`python benchmarks/export_vllm.py` writes `results/export_vllm.json`; it needs `make consumer-vllm`. vLLM loads the
checkpoint and the float model in its own environment, `benchmarks/consumers/vllm_run.py`.

Single layers are compared with exact integer arithmetic. Of the whole model: agreement of the best token and the
Kullback-Leibler divergence over the 20 best tokens of vLLM and the rest taken together, at every position of each
prompt; and where greedy text first differs, with the margin between the two best tokens there.

Two controls say what such figures are worth. The float model in vLLM and in transformers: how well the two agree where
nothing is rounded. And calib's quantized model against itself with embeddings changed by 1e-4: a value between two
codes takes the other one, as it does where float sums are added in another order, and the difference spreads. The
largest change of a best token's log-probability in that control is the allowance for margins of greedy text.

The cured model is what any checkpoint holds: smoothed, rotated in its weights, these rounded with error compensation,
and a few layers in float (`--cure smooth,rotate,compensate,keep`).

On a processor with AMX vLLM takes a kernel that quantizes each token of symmetric inputs itself, and stops if
activations are float32; there the static kernel is put in its place, and the result says so.

Speed is that of all quantized layers together, 128 rows, against float32 products of the same shapes, in turn; and of
the whole model in turn with the float model in another process: reading prompts, and writing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import fetch
from results_file import median_interval, write
from safetensors.torch import load_file

from calib.corpus import build_blocks
from calib.cures.result import CureOptions
from calib.cures.search import find_cure
from calib.export import export_scales, verify_export
from calib.export.emulate import compressed_tensors_plan
from calib.export.read_compressed_tensors import CompressedCheckpoint, read_compressed_tensors
from calib.measurement.engine import measure
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizedModel
from calib.scales import choose_scales
from calib.schema.scales import ScaleFile

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".consumers" / "vllm" / "bin" / "python"
NUDGE = 1e-4
TURNS = 15
TASKS = {"reading 4 prompts of 256 tokens": (4, 256, 1), "writing 32 tokens for each of 4 prompts": (4, 16, 32)}
"""Rows, tokens of a prompt, new tokens."""
CURES = ("smooth", "rotate", "compensate", "keep")
KEPT = 3
"""Layers that the cure may leave in float, the largest range against the usual first: an ignore list."""
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="instead of SmolLM2")
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    opened = open_model(given.model or fetch("smollm2"), device="cpu", dtype="float32")
    blocks = build_blocks([], opened.tokenizer, samples=given.samples, max_length=256)
    measurement = measure(opened, blocks)
    prompts = build_blocks([], opened.tokenizer, samples=3, max_length=48, seed=11).input_ids.tolist()
    results: dict[str, Any] = {"prompts": len(prompts), "tokens": len(prompts[0])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain = folder / "float"
        opened.model.save_pretrained(plain)
        opened.tokenizer.save_pretrained(plain)
        slow = run(plain, prompts, folder / "float.json")
        results["vllm"] = slow["vllm"]
        results["static kernel instead of that of AMX"] = slow["instead_of_amx"]
        results["float model in vLLM against transformers"] = compare(opened, None, prompts, slow)
        kinds: dict[str, dict[str, Any]] = {
            "symmetric": {},
            "symmetric, down_proj in float": {"ignore": ["*.down_proj:input"]},
        }
        for name, options in kinds.items():
            scales = choose_scales(measurement, **options)
            results[name] = examine(opened, scales, folder / name.replace(", ", "_").replace(" ", "_"), prompts)
            write("export_vllm", results)
        held_out = build_blocks([], opened.tokenizer, samples=20, max_length=256, seed=7)
        cured = find_cure(opened, measurement, blocks, held_out, CureOptions(cures=CURES, keep=KEPT))
        results["cured"] = {
            "cure": cured.candidate.name,
            "quality": {
                row.name: {"kl": row.divergence.value, "ratio": row.ratio and row.ratio.value} for row in cured.rows
            },
            **examine(cured.opened, cured.scales, folder / "cured", prompts, weights=cured.plan.rounded),
            "model_speed": {dtype: model_speed(plain, folder / "cured", dtype) for dtype in ("float32", "bfloat16")},
        }
        write("export_vllm", results)


def examine(opened: OpenedModel, scales: ScaleFile, out: Path, prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    """Exports scales, loads them in transformers and vLLM, and compares."""
    export_scales(scales, out, opened, to="compressed-tensors", **more)
    checked = verify_export(out)
    assert checked.passed, checked.problems
    assert checked.consumer is not None
    record = out.with_suffix(".json")
    found = run(out, prompts, record)
    read = read_compressed_tensors(out)
    return {
        "transformers_largest_difference": checked.consumer.model_difference,
        **scales_read(read, found),
        **single_layers(read, record.with_name(f"{record.name}.layers.safetensors")),
        **compare(opened, read, prompts, found),
        "layer_speed_against_float32": median_interval(found["layer_speed"]),
    }


def run(folder: Path, prompts: list[list[int]], out: Path) -> dict[str, Any]:
    """What vLLM computes."""
    tokens = out.with_suffix(".tokens")
    tokens.write_text(json.dumps(prompts))
    script = str(ROOT / "benchmarks" / "consumers" / "vllm_run.py")
    done = subprocess.run(
        [str(PYTHON), script, str(folder), str(tokens), str(out)],
        env=vllm_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"vLLM failed on {folder.name}: {done.stderr[-2000:]}")
    return dict(json.loads(out.read_text()))


def vllm_environment() -> dict[str, str]:
    settings = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings


def model_speed(plain: Path, quantized: Path, dtype: str) -> dict[str, Any]:
    """Time of the float model over that of the quantized one, both in vLLM with activations of a dtype."""
    script = str(ROOT / "benchmarks" / "consumers" / "vllm_speed.py")
    found: dict[str, Any] = {}
    for task, (rows, tokens, new) in TASKS.items():
        arguments = (dtype, str(rows), str(tokens), str(new))
        with ExitStack() as running:
            both = [
                running.enter_context(
                    subprocess.Popen(
                        [str(PYTHON), script, str(folder), *arguments],
                        env=vllm_environment(),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                )
                for folder in (plain, quantized)
            ]
            for one in both:
                while _line(one) != "ready":
                    pass
            ratios = []
            for number in range(-2, TURNS):
                spent = [_turn(one) for one in both]
                if number >= 0:
                    ratios.append(spent[0] / spent[1])
            for one in both:
                assert one.stdin is not None
                one.stdin.close()
        found[task] = median_interval(ratios)
    return found


def _turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(_line(process))


def _line(process: subprocess.Popen[str]) -> Any:
    """The next line that is JSON; vLLM may write others."""
    assert process.stdout is not None
    while line := process.stdout.readline():
        try:
            return json.loads(line)
        except ValueError:
            continue
    raise SystemExit("vLLM ended before it answered")


def scales_read(read: CompressedCheckpoint, found: dict[str, Any]) -> dict[str, Any]:
    """How many layers of vLLM hold the scale of the file, and in which kernel."""
    held = {n.removesuffix(".input_scale"): s for n, s in found["scales"].items() if n.endswith(".input_scale")}
    pairs = [(read.linears[part].input_scale, scale) for name, scale in held.items() for part in parts(name)]
    largest = max(abs(scale / written - 1) for written, scale in pairs)
    kernels = sorted({kernel for name, kernel in found["scales"].items() if name.endswith(".kernel")})
    layers = sum(len(parts(name)) for name in held)
    return {
        "layers": layers,
        "of_layers": len(read.linears),
        "fused": len(held),
        "scales_largest_relative_difference": largest,
        "kernels": kernels,
    }


def parts(name: str) -> list[str]:
    """Layers of the checkpoint that make a layer of vLLM."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in PARTS.get(last, (last,))]


def single_layers(read: CompressedCheckpoint, path: Path) -> dict[str, Any]:
    """Differences of single layers from exact integers, relative to their largest output."""
    worst = 0.0
    for name, theirs in load_file(path).items():
        linears = [read.linears[part] for part in parts(name)]
        first = linears[0]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, first.codes.shape[1], generator=generator) * (first.input_scale * 60)
        codes = torch.clamp(torch.round(x / first.input_scale) + first.input_zero_point, -128, 127)
        whole = (codes - first.input_zero_point).double()
        ours = torch.cat([whole @ one.codes.double().T * one.weight_scale.double().T for one in linears], 1)
        ours = ours * first.input_scale
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
    return {"single_layers_largest_difference": worst}


def compare(
    opened: OpenedModel, read: CompressedCheckpoint | None, prompts: list[list[int]], found: dict[str, Any]
) -> dict[str, Any]:
    """Our quantized model, or without a checkpoint the float model, against vLLM, and the controls."""
    plan = None if read is None else compressed_tensors_plan(read)
    agree, divergences, float_agree, control, moved, differences = [], [], [], [], [], []
    for prompt, theirs in zip(prompts, found["prompts"], strict=True):
        text = theirs["text"]
        ids = torch.tensor([[*prompt, *text]])
        plain = logprobs(opened, None, ids)
        ours = plain if plan is None else logprobs(opened, plan, ids)
        nudged = logprobs(opened, plan, ids, nudge=NUDGE)
        for place, entry in enumerate(theirs["logprobs"]):
            best = {int(token): value for token, value in entry.items()}
            top = max(best, key=lambda token: best[token])
            agree.append(int(ours[place].argmax()) == top)
            float_agree.append(int(plain[place].argmax()) == top)
            divergences.append(divergence(best, ours[place]))
        control.append((ours.argmax(-1) == nudged.argmax(-1)).float().mean().item())
        first = ours.argmax(-1, keepdim=True)
        moved.append(float((ours.gather(1, first) - nudged.gather(1, first)).abs().max()))
        greedy = ours[len(prompt) - 1 : -1].argmax(-1).tolist()
        place = next((i for i, (a, b) in enumerate(zip(greedy, text, strict=True)) if a != b), None)
        differences.append(None if place is None else {"token": place, "margin": round(theirs["margins"][place], 4)})
    allowance = round(max(moved), 4)
    return {
        "positions": len(agree),
        "top1_agreement": round(float(np.mean(agree)), 4),
        "top1_agreement_of_float_model": round(float(np.mean(float_agree)), 4),
        "control_top1_agreement_with_itself_nudged": round(float(np.mean(control)), 4),
        "kl_mean": float(f"{np.mean(divergences):.3g}"),
        "kl_max": float(f"{np.max(divergences):.3g}"),
        "greedy_tokens": sum(len(theirs["text"]) for theirs in found["prompts"]),
        "greedy_first_difference": differences,
        "greedy_differences_above_allowance": sum(d is not None and d["margin"] > allowance for d in differences),
        "allowance_nats": allowance,
    }


def logprobs(opened: OpenedModel, plan: Any, ids: torch.Tensor, *, nudge: float = 0.0) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocabulary]``, of the float model if there is no plan."""
    table: Any = opened.model.get_input_embeddings()
    noise = torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(0)) if nudge else None

    def changed(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if noise is None else output * (1 + nudge * noise[args[0]])

    handle = table.register_forward_hook(changed)
    try:
        with torch.no_grad(), nullcontext() if plan is None else QuantizedModel(opened.model, plan):
            return opened.model(input_ids=ids).logits[0].log_softmax(-1)
    finally:
        handle.remove()


def divergence(theirs: dict[int, float], ours: torch.Tensor) -> float:
    """KL(vLLM || ours) over vLLM's best tokens and the rest as one."""
    p = np.exp(list(theirs.values()))
    q = np.exp(ours[list(theirs)].double().numpy())
    rest_p, rest_q = max(1 - p.sum(), 1e-9), max(1 - q.sum(), 1e-9)
    value = float((p * (np.log(p) - np.log(q))).sum() + rest_p * math.log(rest_p / rest_q))
    return max(value, 0.0)


if __name__ == "__main__":
    main()
