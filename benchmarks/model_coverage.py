# SPDX-License-Identifier: Apache-2.0
"""Coverage over all architectures that transformers builds from a small configuration.

For each, one forward pass with and one without calibration: what was found, what fired, which linear layers were not
covered, whether the outputs are bit-identical and whether anything was left behind. ``--part i/n -o FILE`` shares the
work among processes; ``--page FILE...`` then writes `results/model_coverage.json` and `docs/coverage.md`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks import tiny_models  # noqa: E402
from calib.measurement import Calibration  # noqa: E402
from calib.measurement.head import takes_cache  # noqa: E402

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
SECONDS = 90
RESULT, PAGE = ROOT / "benchmarks" / "results" / "model_coverage.json", ROOT / "docs" / "coverage.md"


def architectures() -> list[tuple[str, str, str]]:
    """(task, class, model type) of every class in the mappings, each class once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str, str]] = {}
    for task, mapping in TASKS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in names if isinstance(names, tuple | list) else [names]:
                if name not in found or found[name][0] == "causal":  # a class of several tasks: not the text alone
                    found[name] = (task, name, model_type)
    return list(found.values())


def examine(task: str, class_name: str, model_type: str) -> dict[str, Any]:
    """One architecture: a record for the page."""
    record: dict[str, Any] = {"class": class_name, "model_type": model_type, "task": task, "stage": "built"}
    started = time.perf_counter()
    try:
        with _limit(SECONDS), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = tiny_models.build(class_name, model_type)
            record["stage"] = "run"
            off = {"use_cache": False} if takes_cache(model) else {}
            inputs = _first_that_runs(model, [x for i in tiny_models.inputs_of(model, task) for x in ({**i, **off}, i)])
            record |= {"stage": "measured", "inputs": sorted(inputs)}
            record |= compare(model, inputs)
            record["stage"] = "done"
    except Exception as error:  # of any model class: the page tells it
        record["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def compare(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Runs a model without and with calibration, as `measure` does: nothing is kept in a cache."""
    plain = _outputs(model, inputs)
    again = _outputs(model, inputs)
    before = _state(model)
    calibration = Calibration(model, keep_cache=False)
    caching = {"use_cache": True} if calibration.watches_cache else {}
    with calibration:
        measured = _outputs(model, {**inputs, **caching})
    sites = calibration.sites()
    names = {name: kind for site in sites.values() for name, kind in {site.name: site.kind, **site.aliases}.items()}
    reached = {name.partition("#")[0].partition("@")[0] for name in names}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    uncovered = [name for name in linears if f"{name}:input" not in reached]
    return {
        "repeatable": _equal(plain, again),
        "identical": _equal(plain, measured),
        "nothing_left": _state(model) == before,
        "sites": dict(sorted(Counter(site.kind for site in sites.values()).items())),
        "kinds": dict(sorted(Counter(port.kind for port in calibration.ports).items())),
        "silent": calibration.silent_ports(),
        "linears": len(linears),
        "uncovered": uncovered,
        "missing": missing_kinds(model, calibration, reached),
    }


def missing_kinds(model: nn.Module, calibration: Calibration, reached: set[str]) -> list[str]:
    """Kinds that the model says it has and of which nothing was seen."""
    from calib.sites.structure import Structure

    structure = Structure.of(model)
    held = {port.kind for port in calibration.ports if port.name in reached}
    expected = {"linear_input"}
    expected |= {"embedding"} if structure.embedding else set()
    expected |= {"residual"} if structure.blocks else set()
    expected |= {"router"} if structure.routers else set()
    expected |= {"expert_hidden"} if calibration.routed.banks else set()
    expected |= {"attention_output"} if structure.attentions else set()
    caching = [m for m in structure.attentions.values() if getattr(m, "is_decoder", True) is not False]
    if caching and getattr(model.config, "use_cache", False):
        expected |= {"key", "value"}
    aliases = {"expert_hidden": {"expert_hidden", "expert_input"}}
    return sorted(kind for kind in expected if not held & aliases.get(kind, {kind}))


def complete(record: dict[str, Any]) -> bool:
    """Whether everything was found and reached, and the model was left as it was."""
    return record["stage"] == "done" and not problems(record)


def problems(record: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    found = []
    if not record["identical"]:
        found.append("outputs differ" if record["repeatable"] else "the model itself is not repeatable")
    if not record["nothing_left"]:
        found.append("something was left behind")
    for title, names in (
        ("no", record["missing"]),
        ("not covered:", record["uncovered"]),
        ("silent:", record["silent"]),
    ):
        if names:
            found.append(f"{title} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    return found


def _first_that_runs(model: nn.Module, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    problem: Exception = ValueError("no inputs are known for this task")
    for inputs in candidates:
        try:
            _outputs(model, inputs)
        except TimeoutError:
            raise
        except Exception as error:  # of any model class: the next form is tried
            problem = error
            continue
        return inputs
    raise problem


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return [t for t in _tensors(model(**inputs)) if t.is_floating_point()]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if key != "past_key_values":
                yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What a calibration could leave behind."""
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import AttentionInterface

    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )
    own = sorted(f"{name}.{key}" for name, m in model.named_modules() for key in vars(m) if key == "forward")
    config = getattr(model, "config", None)
    text = json.dumps(config.to_dict(), sort_keys=True, default=str) if config is not None else ""
    modes = torch._C._len_torch_function_stack()
    return hooks, own, text, modes, Cache.update, AttentionInterface.get_interface, model.training


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="regular expression over class names")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th architecture, for several processes")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, nargs="*", help="write the page from these results, run nothing")
    given = parser.parse_args()
    if given.page is not None:
        read = [json.loads(path.read_text(encoding="utf-8")) for path in given.page or [RESULT]]
        write_page([record for part in read for record in part["records"]], read[0]["versions"])
        return
    import re

    part, parts = (int(n) for n in given.part.split("/"))
    chosen = [a for a in architectures() if not given.only or re.search(given.only, a[1])][part::parts]
    records = []
    for task, class_name, model_type in chosen:
        record = examine(task, class_name, model_type)
        records.append(record)
        what = "complete" if complete(record) else record.get("reason") or "; ".join(problems(record))
        print(f"{class_name} [{record['stage']}] {record['seconds']} s: {what}", flush=True)
    given.output.write_text(json.dumps({"versions": _versions(), "records": records}, indent=1) + "\n")


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def write_page(records: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """`docs/coverage.md`: the counts, what is not as it should be, and why the rest did not run."""
    records = sorted(records, key=lambda r: (list(TASKS).index(r["task"]), r["class"].lower()))
    ran = [r for r in records if r["stage"] in ("measured", "done")]
    done = [r for r in ran if r["stage"] == "done"]
    groups = [
        records,
        ran,
        [r for r in done if r["identical"]],
        [r for r in done if r["nothing_left"]],
        [r for r in done if not r["missing"]],
        [r for r in done if complete(r)],
    ]
    classes, run, same, clean, kinds, whole = (len(group) for group in groups)
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/model_coverage.py`, whose records are `benchmarks/results/model_coverage.json`.",
        f"transformers {versions['transformers']}, torch {versions['torch']}, CPU. Every class of six of transformers'",
        "auto mappings is built from a small configuration with random weights and run on the same input without and",
        "with `Calibration`.",
        "",
        f"{classes} classes; {run} could be built and run. Of these",
        "",
        f"* {same} compute bit-identical outputs with and without calibration,",
        f"* {clean} have no hook, wrapper, mode or change of configuration left afterwards,",
        f"* {kinds} ({100 * kinds / max(1, run):.1f} %) show every kind of site that the model declares: embedding,",
        "  blocks, attention, keys and values, routers, experts, projections,",
        f"* {whole} have no projection that was not covered and no port that stayed silent.",
        "",
        "| task | classes | run | identical | nothing left | all kinds | nothing silent |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        counts = [sum(r["task"] == task for r in group) for group in groups]
        lines.append(f"| {task} | " + " | ".join(map(str, counts)) + " |")
    lines += [
        "",
        "## What is not as it should be",
        "",
        "Most of it is a tower for images or audio that this script has no input for, or a module that the model uses",
        "in some cases only: `calib measure` closes its gate and names it. A projection that is not covered, yet not",
        "silent, is one whose weight the model uses without calling the module, such as `dt_proj` of Mamba.",
        "",
        "| class | what |",
        "|---|---|",
        *(f"| {r['class']} | {_cell('; '.join(problems(r)))} |" for r in done if not complete(r)),
        *(f"| {r['class']} | calibration raised {_cell(r['reason'])} |" for r in ran if r["stage"] == "measured"),
        "",
        "## What was not run, and why",
        "",
        "The script could not make a small configuration that fits (built), or an input (run).",
        "",
        "| class | stage | reason |",
        "|---|---|---|",
        *(f"| {r['class']} | {r['stage']} | {_cell(r['reason'])} |" for r in records if r not in ran),
        "",
        "## Sites",
        "",
        "| class | sites | by kind |",
        "|---|---|---|",
        *(f"| {r['class']} | {sum(r['sites'].values())} | {_counts(r['sites'])} |" for r in done),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for record in records:  # differs from run to run
        record.pop("seconds", None)
    RESULT.write_text(json.dumps({"versions": versions, "records": records}, indent=1) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", " ")


def _counts(sites: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sites.items())


if __name__ == "__main__":
    main()
