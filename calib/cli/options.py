# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and how they become a model, a corpus and a measurement."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.corpus import Rows, TokenBlocks
    from calib.measurement.artifact import Measurement
    from calib.measurement.engine import MeasureOptions
    from calib.models import OpenedModel

__all__ = [
    "batch_size",
    "build_corpus",
    "build_rows",
    "corpus_options",
    "measured",
    "measured_blocks",
    "model_options",
    "opened",
    "output_options",
    "run_options",
    "stop_signal",
]

Decorator = Callable[[Any], Any]


def _together(*decorators: Decorator) -> Decorator:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


model_options = _together(
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--task", help="Task name as optimum calls it; the architecture decides if absent."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or balanced."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings."),
)
corpus_options = _together(
    click.option(
        "-d", "--data", multiple=True, help="File, folder, hub:ID, builtin, or domain=PATH; repeatable; see docs."
    ),
    click.option("--samples", default=128, show_default=True, help="Blocks of tokens, or examples."),
    click.option("--max-length", default=512, show_default=True, help="Tokens of a block."),
    click.option("--seed", default=0, show_default=True, help="Of the choice of blocks."),
    click.option("--layout", type=click.Choice(["blocks", "documents"]), default="blocks", show_default=True),
    click.option("--add-bos", is_flag=True, help="Begin every block with the BOS token."),
    click.option("--chat-template", is_flag=True, help="Write conversations with the model's chat template."),
)
run_options = _together(
    click.option("--batch-size", default="auto", show_default=True, help="Rows of a forward pass."),
    click.option("--sites", "site_patterns", multiple=True, help="Measure these only: kind, module, glob or re:..."),
    click.option("--ignore", multiple=True, help="Leave these out, in the same words."),
    click.option("--statistics", type=click.Choice(["full", "ranges"]), default="full", show_default=True),
    click.option("--kernel", type=click.Choice(["auto", "fused", "torch"]), default="auto", show_default=True),
    click.option("--sink-positions", default=4, show_default=True, help="First tokens of a block, kept apart."),
    click.option(
        "--generate", default=0, show_default=True, help="Continue each block by so many tokens, measured too."
    ),
    click.option("--min-expert-tokens", default=1, show_default=True, help="Fewest tokens that each expert must get."),
    click.option("--force-experts", is_flag=True, help="Measure experts without tokens on some, apart, and mark them."),
    click.option("--shard", default="0/1", show_default=True, help="i/n: every n-th batch; see `calib merge`."),
)
output_options = _together(
    click.option("--overwrite", is_flag=True, help="Replace the output folder."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON for machines."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", count=True, help="More; twice shows tracebacks."),
)


def opened(model: str, given: dict[str, Any]) -> OpenedModel:
    """Opens the model that the options name."""
    from calib.models import open_model

    names = ("revision", "task", "dtype", "device", "trust_remote_code")
    return open_model(model, **{name: given[name] for name in names})


def measured(found: OpenedModel, given: dict[str, Any], held: Measurement | None = None) -> tuple[Measurement, bool]:
    """Measures as the options say, with a progress bar; returns the measurement and whether it was interrupted.

    What `held` has is not measured again.
    """
    return measured_blocks(found, build_rows(found, given), given, held)


def measured_blocks(
    found: OpenedModel, blocks: Rows, given: dict[str, Any], held: Measurement | None = None
) -> tuple[Measurement, bool]:
    """The same for blocks that are there already."""
    from calib.measurement.engine import measure, resume
    from calib.protocols.massive_tokens import massive_tokens
    from calib.report.progress import progress

    quiet = given["quiet"] or given["as_json"]
    for note in () if quiet else blocks.notes:
        click.echo(f"note: {note}", err=True)
    with stop_signal() as should_stop, progress(quiet=quiet) as report:
        run = measure if held is None else partial(resume, held=held)
        around = massive_tokens if given.get("protocol") == "max-activations" else None
        measurement = run(
            found, blocks, options=_options(given), progress=report, should_stop=should_stop, around=around
        )
        stopped = should_stop()
    decoded = measurement.run.decoder
    if decoded and not quiet:
        click.echo(f"note: {_decoder_note(decoded)}", err=True)
    return measurement, stopped


def _decoder_note(decoded: dict[str, int]) -> str:
    said = {
        "target": "{} rows read their targets",
        "greedy": "{} rows read what the model writes greedily for want of targets",
    }
    return "decoder: " + ", ".join(said[name].format(count) for name, count in decoded.items())


def build_rows(found: OpenedModel, given: dict[str, Any]) -> Rows:
    """What the options name: blocks of tokens, or examples where data hold more than text."""
    from calib.cli.examples import build_examples_of, needs_examples

    return build_examples_of(found, given) if needs_examples(found, given) else build_corpus(found, given)


def build_corpus(found: OpenedModel, given: dict[str, Any]) -> TokenBlocks:
    """The blocks of tokens that the options name."""
    from calib.corpus import build_blocks

    names = ("samples", "max_length", "seed", "layout", "add_bos", "chat_template")
    return build_blocks(given["data"], found.tokenizer, **{name: given[name] for name in names})


def _options(given: dict[str, Any]) -> MeasureOptions:
    from calib.measurement.engine import MeasureOptions

    return MeasureOptions(
        batch_size=batch_size(given["batch_size"]),
        sites=given["site_patterns"],
        ignore=given["ignore"],
        statistics=given["statistics"],
        kernel=given["kernel"],
        sink_positions=given["sink_positions"],
        shard=_shard(given["shard"]),
        generate=given["generate"],
        min_expert_tokens=given["min_expert_tokens"],
        force_experts=given["force_experts"],
        protocol=given.get("protocol"),
        command="calib " + " ".join(Path(a).name if a.startswith("/") else a for a in sys.argv[1:]),
    )


def batch_size(text: str) -> int | None:
    """Rows of a forward pass, None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: is no number of rows; pass auto, or 1 or more")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {text}: is not of the form i/n; pass for example 0/4")
    return int(index), int(count)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Within the block the first interrupt is a request to stop after this batch; the second one stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo("\nstopping after this batch; press again to stop at once", err=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
