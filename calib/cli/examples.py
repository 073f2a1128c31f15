# SPDX-License-Identifier: Apache-2.0
"""Which data a model needs: blocks of tokens, or examples with pictures, sound and targets; and what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calib.errors import CorpusError, ModelError, UsageError

if TYPE_CHECKING:
    from calib.corpus import ExampleRows
    from calib.models import OpenedModel

__all__ = ["build_examples_of", "needs_examples", "require_processor", "require_text"]

_WORDS = {"image": "pictures", "audio": "sound", "text": "text", "target": "targets"}
_GIVE = {
    "image": "a folder of pictures, or a .jsonl with `image`",
    "audio": "a folder of .wav files, or a .jsonl with `audio`",
}


def needs_examples(found: OpenedModel, given: dict[str, Any]) -> bool:
    """Whether the data are examples, as far as this model can use them.

    Raises:
        CorpusError: the data hold nothing that the model takes, or something that it does not.
    """
    from calib.corpus import data_kinds
    from calib.models.takes import takes, writes

    taken, name = takes(found.model), found.provenance.name
    held = data_kinds(given["data"])
    if not taken:
        return False
    needed = False
    for source, kinds in (held or {"builtin": frozenset({"text"})}).items():
        media = kinds & {"image", "audio"}
        if not media & taken and "text" not in taken:
            raise CorpusError(
                f"{source}: holds {_listed(kinds)}, and {name} takes {_listed(taken)}; "
                f"pass -d with {' or '.join(_GIVE[kind] for kind in sorted(taken))}"
            )
        if media - taken and not (media & taken or _is_folder_of_text(kinds, source)):
            raise CorpusError(
                f"{source}: holds {_listed(media)}, and {name} takes {_listed(taken)} only; pass other data or a model "
                f"that takes {_listed(media)}"
            )
        needed |= bool(media & taken) or ("target" in kinds and writes(found.model))
    return needed


def require_text(found: OpenedModel, given: dict[str, Any], option: str) -> None:
    """Refuses examples where blocks of tokens are compared.

    Raises:
        UsageError: naming the option, or the command, that needs text.
    """
    if needs_examples(found, given):
        raise UsageError(f"{option}: works on blocks of text, and these data are examples; pass text, or do without it")


def build_examples_of(found: OpenedModel, given: dict[str, Any]) -> ExampleRows:
    """The examples that the options name, as the model's processor makes them.

    Raises:
        ModelError: pictures or sound, and no processor that works beside the weights.
        UsageError: options that are about blocks of tokens.
    """
    from calib.corpus import Preparation, build_examples, data_kinds
    from calib.models.takes import parameters_of, takes

    for option, kept in (("add_bos", False), ("layout", "blocks"), ("protocol", None)):
        if given.get(option, kept) != kept:
            raise UsageError(f"--{option.replace('_', '-')}: is for blocks of text; leave it out for these data")
    kinds = frozenset[str]().union(*data_kinds(given["data"]).values())
    if kinds & {"image", "audio"}:
        require_processor(found, kinds & {"image", "audio"})
    preparation = Preparation(
        found.processor, found.tokenizer, takes(found.model), parameters_of(found.model), given["max_length"]
    )
    return build_examples(
        given["data"],
        preparation,
        found.tokenizer,
        samples=given["samples"],
        max_length=given["max_length"],
        seed=given["seed"],
    )


def require_processor(found: OpenedModel, kinds: frozenset[str]) -> Any:
    """The processor of a model.

    Raises:
        ModelError: there is none that works, and why.
    """
    from calib.models.tokens import processor_fault

    if found.processor is None:
        raise ModelError(
            f"model {found.provenance.name}: has no processor that works for {_listed(kinds)} "
            f"({processor_fault(found.folder)}); fetch the files of the original model, or install what is missing"
        )
    return found.processor


def _is_folder_of_text(kinds: frozenset[str], source: str) -> bool:
    """Pictures between texts in a folder are passed over, as they always were."""
    from pathlib import Path

    from calib.corpus import parse_source

    return "text" in kinds and Path(parse_source(source)[1]).is_dir()


def _listed(kinds: frozenset[str]) -> str:
    return " and ".join(_WORDS[kind] for kind in sorted(kinds))
