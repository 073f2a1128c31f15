# SPDX-License-Identifier: Apache-2.0
"""`harness_model`: a quantized model as EleutherAI's lm-evaluation-harness takes it, for tasks beyond perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from calib.errors import UsageError
from calib.evaluation.prefix import require_in_vocabulary
from calib.models import OpenedModel
from calib.quantized import QuantizationPlan, QuantizedModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["harness_model"]


@contextmanager
def harness_model(
    opened: OpenedModel,
    plan: QuantizationPlan | None = None,
    *,
    prefix: Sequence[int] = (),
    **options: Any,
) -> Iterator[Any]:
    """A model for `lm_eval.simple_evaluate`; within the context it computes as its quantized deployment would.

    ::

        with harness_model(opened, plan) as model:
            results = lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

    Args:
        opened: a language model, with its cures applied.
        plan: what to round; None for the float model.
        prefix: token ids in front of every sequence, of a cure; as many as the plan leaves in float. Give the float
            model the same, to compare the two.
        options: of `lm_eval.models.huggingface.HFLM`: ``batch_size``, ``max_length`` ...

    Raises:
        UsageError: the harness is not installed, the model is no language model with a tokenizer, or the prefix is not
            the plan's.
        ArtifactError: the prefix is outside of the vocabulary.
    """
    name, ids = opened.provenance.name, list(prefix)
    if opened.task != "text-generation" or opened.tokenizer is None:
        raise UsageError(f"{name}: the harness needs a language model with a tokenizer; pass one")
    if plan is not None and plan.skip_positions != len(ids):
        raise UsageError(
            f"prefix: has {len(ids)} tokens, and the plan leaves {plan.skip_positions} positions in float; "
            "pass the prefix that the plan was made with"
        )
    require_in_vocabulary(opened.model, tuple(ids))
    made = _prefixed_class()(opened.model, opened.tokenizer, ids, options)
    with nullcontext() if plan is None else QuantizedModel(opened.model, plan):
        yield made


@cache
def _prefixed_class() -> Any:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UsageError("lm-evaluation-harness: is not installed; pip install 'calib[lm-eval]'") from error

    class Prefixed(HFLM):
        """The harness's own model, with tokens in front of all that it reads."""

        def __init__(self, model: Any, tokenizer: Any, prefix: list[int], options: dict[str, Any]) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
            self.prefix = torch.tensor([prefix], dtype=torch.long, device=self.device)

        @property
        def max_length(self) -> int:
            """Positions that are left for the task."""
            return int(super().max_length) - self.prefix.shape[1]

        def _with_prefix(self, tokens: Tensor) -> Tensor:
            return torch.cat([self.prefix.expand(len(tokens), -1), tokens], 1)

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            logits: Tensor = super()._model_call(self._with_prefix(inps), attn_mask, labels)
            return logits[:, self.prefix.shape[1] :]

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            more = self.prefix.shape[1]
            mask = options.pop("attention_mask", None)
            if mask is not None:  # texts of unequal length are padded at their beginning, behind the prefix
                options["attention_mask"] = torch.cat([mask.new_ones(len(mask), more), mask], 1)
            found: Tensor = super()._model_generate(self._with_prefix(context), max_length + more, stop, **options)
            return found[:, more:]

    return Prefixed
