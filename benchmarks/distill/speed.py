# SPDX-License-Identifier: Apache-2.0
"""What CMI costs: a step, an epoch with its refresh of centroids, and memory.

`python benchmarks/distill/speed.py` writes `results/distill_speed.json`. CPU time of one thread, steps with and without
CMI in turns, 15 pairs for each network; an epoch is `fine_tune` beside the same loop written plainly. Memory is that of
a pass over images that a generator makes batch by batch, in a process of its own for each number of images: it must
not grow with the number. Target: a step costs at most 1.15 times a plain one.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from results_file import median_interval, write
from torch import Tensor, nn

from calib.distill import ClassInformation, TeacherSettings, fine_tune, mcmi_loss, measure_information
from calib.distill.mcmi import floored
from calib.distill.networks import make_network
from calib.distill.optimiser import make_optimiser

PAIRS, STEPS, BATCH, CLASSES = 15, 6, 64, 10
NETWORKS = {"resnet8": 14, "resnet20": 28, "mlp128": 14}
EPOCH_NETWORK, EPOCH_BATCHES, EPOCH_PAIRS = "resnet8", 16, 7
IMAGES = (2_000, 20_000, 60_000)
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of fine-tuning with CMI.")
    parser.add_argument("--pass-over", type=int, help="internal: one pass over so many images, prints MB")
    images = parser.parse_args().pass_over
    if images is not None:
        print(json.dumps(pass_over(images)))
        return
    print("budget: 4 minutes on one core", flush=True)
    write(
        "distill_speed",
        {
            "target": {"step_ratio": 1.15},
            "interval": f"90 % (bootstrap of the median), {PAIRS} pairs of {STEPS} steps of {BATCH} images",
            "step_ratio": {f"{name}, {size} x {size}": steps(name, size) for name, size in NETWORKS.items()},
            "epoch_ratio": {
                "network": f"{EPOCH_NETWORK}, 14 x 14, {EPOCH_BATCHES} batches, {EPOCH_PAIRS} pairs",
                "centroids_refreshed_by_a_pass": epochs(),
            },
            "memory": memory(),
        },
    )


def batches(size: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, 1, size, size, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def one_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    loss = loss_of(model(batch[0]), batch[1])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimiser.step()


def steps(name: str, size: int) -> dict[str, Any]:
    """Step with the MCMI loss over step with cross entropy, all else equal."""
    data = batches(size, STEPS)
    sides: dict[str, tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]] = {}
    torch.manual_seed(0)
    start = make_network(name, CLASSES, channels=1, size=size)
    rows = floored(torch.full((CLASSES, CLASSES), 1 / CLASSES))
    for side in ("plain", "mcmi", "plain again"):
        model = copy.deepcopy(start)
        optimiser = make_optimiser(model.parameters(), TeacherSettings().optimiser, 20)[0]
        with_cmi: Callable[[Tensor, Tensor], Tensor] = lambda x, y: mcmi_loss(x, y, rows, 0.25).loss  # noqa: E731
        sides[side] = (model, optimiser, with_cmi if side == "mcmi" else plain_loss)

    def seconds(side: str) -> float:
        model, optimiser, loss_of = sides[side]
        begin = time.process_time()
        for batch in data:
            one_step(model, optimiser, batch, loss_of)
        return time.process_time() - begin

    pairs = paired(seconds, ("plain", "mcmi"), PAIRS)
    noise = paired(seconds, ("plain", "plain again"), PAIRS)["ratio"]
    print(name, size, pairs["ratio"], noise, flush=True)
    return {
        "ratio": pairs["ratio"],
        "ratio_of_plain_to_itself": noise,
        "ms_plain": pairs["ms_first"] / STEPS,
        "ms_mcmi": pairs["ms_second"] / STEPS,
    }


def epochs() -> dict[str, Any]:
    """Epochs of `fine_tune`, each with its pass for the centroids, over epochs of a plain loop.

    The pass before the first epoch is taken out: three epochs minus one.
    """
    data = batches(14, EPOCH_BATCHES)
    torch.manual_seed(0)
    start = make_network(EPOCH_NETWORK, CLASSES, channels=1, size=14)

    def seconds(side: str) -> float:
        def spent(count: int) -> float:
            model = copy.deepcopy(start).train()
            begin = time.process_time()
            if side == "plain":
                optimiser = make_optimiser(model.parameters(), TeacherSettings().optimiser, count)[0]
                for _ in range(count):
                    for batch in data:
                        one_step(model, optimiser, batch, plain_loss)
            else:
                fine_tune(model, data, TeacherSettings(strength=0.25, epochs=count))
            return time.process_time() - begin

        return spent(3) - spent(1)

    pairs = paired(seconds, ("plain", "mcmi"), EPOCH_PAIRS)
    print("epoch", pairs["ratio"], flush=True)
    return {"ratio": pairs["ratio"]}


def paired(seconds: Callable[[str], float], sides: tuple[str, str], count: int) -> dict[str, Any]:
    """Ratio of second to first, in turns, the first of a pair in turns as well; a warm-up of each is not counted."""
    for side in sides:
        seconds(side)
    ratios, spent = [], dict.fromkeys(sides, 0.0)
    gc.disable()
    try:
        for number in range(count):
            found = {side: seconds(side) for side in (sides if number % 2 else sides[::-1])}
            ratios.append(found[sides[1]] / found[sides[0]])
            for side, value in found.items():
                spent[side] += 1000 * value / count
    finally:
        gc.enable()
    return {"ratio": median_interval(ratios), "ms_first": spent[sides[0]], "ms_second": spent[sides[1]]}


def memory() -> dict[str, Any]:
    """Growth of the resident memory during a pass, in MB, by number of images."""
    found = {}
    for images in IMAGES:
        command = [sys.executable, str(Path(__file__).resolve()), "--pass-over", str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[str(images)] = json.loads(done.stdout)
        print(images, found[str(images)], flush=True)
    return {"network": "resnet8, 14 x 14, batches of 256", "by_images": found}


def pass_over(images: int) -> dict[str, float]:
    """Largest resident memory at any batch, less that after ten batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_network("resnet8", CLASSES, channels=1, size=14)
    resident: list[float] = []

    def made(count: int) -> Iterator[Batch]:
        for _ in range(count):
            resident.append(resident_mb())
            yield torch.randn(256, 1, 14, 14), torch.randint(CLASSES, (256,))

    measure_information(model, made(10))  # allocates what any pass allocates
    trim = ctypes.CDLL("libc.so.6").malloc_trim  # hands back what the allocator holds and nobody uses (glibc)
    trim(0)
    resident.clear()
    before = resident_mb()
    information: ClassInformation = measure_information(model, made(images // 256 + 1))[0]
    grown = max(resident) - before
    trim(0)
    state = sum(t.numel() * t.element_size() for t in vars(information).values() if isinstance(t, Tensor))
    return {
        "growth_mb": round(grown, 1),
        "growth_mb_in_use_at_the_end": round(resident_mb() - before, 1),
        "state_kb": round(state / 1024, 1),
        "images_mb": round(images * 14 * 14 * 4 / 2**20, 1),
    }


def resident_mb() -> float:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
