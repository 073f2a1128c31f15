# SPDX-License-Identifier: Apache-2.0
"""Models in lm-evaluation-harness, against forward passes of our own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.errors import ArtifactError, UsageError
from calib.evaluation.harness import harness_model
from calib.models import OpenedModel, open_model
from calib.quantized import QuantizationPlan, QuantizedModel, plan_from_scales

lm_eval = pytest.importorskip("lm_eval")

PREFIX = [7, 9]


@pytest.fixture(scope="module")
def opened(tiny_llama: Path) -> OpenedModel:
    return open_model(tiny_llama, device="cpu", dtype="float32")


def planned(opened: OpenedModel, skip: int) -> QuantizationPlan:
    return plan_from_scales(opened.model, inputs="dynamic-per-token", bits=4, skip_positions=skip)


def log_likelihood(opened: OpenedModel, prefix: list[int], context: str, continuation: str) -> float:
    """Of a continuation, token by token, without padding."""
    first = opened.tokenizer(context, add_special_tokens=False).input_ids
    whole = opened.tokenizer(context + continuation, add_special_tokens=False).input_ids
    ids = torch.tensor([prefix + whole])
    with torch.no_grad():
        scores = torch.log_softmax(opened.model(input_ids=ids).logits[0, :-1].double(), -1)
    picked = scores.gather(-1, ids[0, 1:, None])[:, 0]
    return float(picked[len(prefix) + len(first) - 1 :].sum())


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["plain", "prefix"])
def test_likelihoods_are_those_of_the_quantized_model(opened: OpenedModel, prefix: list[int]) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("the friends", " of the people"), ("we", " hold these truths to be self-evident"), ("a", " b")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    plan = planned(opened, len(prefix))
    with harness_model(opened, plan, prefix=prefix, batch_size=2) as model:
        found = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    with QuantizedModel(opened.model, plan):
        expected = [log_likelihood(opened, prefix, *pair) for pair in pairs]
    assert found == pytest.approx(expected, abs=2e-3)
    in_float = [log_likelihood(opened, prefix, *pair) for pair in pairs]
    assert found != pytest.approx(in_float, abs=2e-3)
    with harness_model(opened, prefix=prefix) as model:
        plain = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    assert plain == pytest.approx(in_float, abs=2e-3)


def test_texts_are_written_behind_the_prefix(opened: OpenedModel) -> None:
    from lm_eval.api.instance import Instance

    contexts = ["the people of the states", "we"]
    ask = {"until": ["\u0000"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, ask), i) for i, context in enumerate(contexts)]
    plan = planned(opened, len(PREFIX))
    with harness_model(opened, plan, prefix=PREFIX, batch_size=2) as model:
        assert model.max_length == opened.model.config.max_position_embeddings - len(PREFIX)
        found = model.generate_until(requests, disable_tqdm=True)
    expected = []
    with QuantizedModel(opened.model, plan), torch.no_grad():
        for context in contexts:
            ids = PREFIX + opened.tokenizer(context, add_special_tokens=False).input_ids
            written: list[int] = []
            for _ in range(6):
                logits = opened.model(input_ids=torch.tensor([ids + written])).logits
                written.append(int(logits[0, -1].argmax()))
            expected.append(opened.tokenizer.decode(written, skip_special_tokens=True))
    assert found == expected


def test_a_task_is_evaluated(opened: OpenedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)
    rows = [{"q": "the people", "a": [" of", " zzz"], "y": 0}, {"q": "we hold", "a": [" qqq", " these"], "y": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: y\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc}]\n"
    )
    from lm_eval.tasks import TaskManager

    plan = planned(opened, 0)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with harness_model(opened, plan) as model:
        found = lm_eval.simple_evaluate(model=model, tasks=["words"], task_manager=tasks, bootstrap_iters=0)
    with QuantizedModel(opened.model, plan):
        right = [
            max((0, 1), key=lambda i: log_likelihood(opened, [], row["q"], row["a"][i])) == row["y"] for row in rows
        ]
    assert found["results"]["words"]["acc,none"] == sum(right) / 2


def test_what_does_not_fit_is_named(opened: OpenedModel, tiny_bert: Path) -> None:
    def entered(*args: Any, **options: Any) -> None:
        with harness_model(*args, **options):
            raise AssertionError("entered")

    with pytest.raises(UsageError, match="0 tokens, and the plan leaves 2 positions in float"):
        entered(opened, planned(opened, 2))
    with pytest.raises(ArtifactError, match="vocabulary"):
        entered(opened, prefix=[10**6])
    with pytest.raises(UsageError, match="needs a language model"):
        entered(open_model(tiny_bert, device="cpu"))
