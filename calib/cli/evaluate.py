# SPDX-License-Identifier: Apache-2.0
"""`calib evaluate MODEL [--scales SCALES]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.config import RecipeCommand
from calib.cli.examples import require_text
from calib.cli.options import batch_size, model_options, opened
from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.quantized import QuantizedWeight

__all__ = ["command"]

_MODES = ["static", "dynamic-per-token", "none"]


@click.command("evaluate", cls=RecipeCommand)
@click.argument("model")
@click.option("--scales", type=click.Path(path_type=Path), help="scales.json or its folder, of this very model.")
@click.option("-d", "--data", multiple=True, help="Text that was not calibrated on, as `calib measure` takes it.")
@click.option("--samples", default=48, show_default=True, help="Blocks of tokens.")
@click.option("--max-length", default=512, show_default=True, help="Tokens of a block.")
@click.option("--seed", default=1, show_default=True, help="Of the choice of blocks; `calib measure` takes 0.")
@click.option("--add-bos", is_flag=True, help="Begin every block with the BOS token.")
@click.option("--inputs", type=click.Choice(_MODES), multiple=True, help="Rows; all that can be had if absent.")
@click.option("--kv-cache", type=click.Choice(_MODES), default="none", show_default=True,
              help="How keys and values are rounded, in every row.")  # fmt: skip
@click.option("--kv-bits", type=click.IntRange(2, 16), help="Of keys and values; those of the scales if absent.")
@click.option("--convention", type=click.Choice(["calib", "compressed-tensors"]), default="calib", show_default=True,
              help="Whose formula makes a scale of a range.")  # fmt: skip
@click.option("--ignore", multiple=True, help="Layers left in float: module, glob or re:...")
@click.option("--layers", default=2, show_default=True, help="Blocks of which every tensor is compared; 0 for none.")
@click.option("--batch-size", default="auto", show_default=True, help="Rows of a forward pass.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", count=True, help="Twice shows tracebacks.")
def command(model: str, scales: Path | None, **given: Any) -> None:
    """Say what quantization costs MODEL, on text that it was not calibrated on.

    Rows: the float model, weights only, a dynamic scale per token, and with --scales the static scales. Cures of the
    scale file are applied to MODEL first, the checkpoint that they were found for; a prefix stands in front of every
    block.

    \b
    calib evaluate MODEL                                 what INT8 would cost without static scales
    calib evaluate MODEL --scales int8 -d held_out.txt
    """  # noqa: D301 - click reads the backspace as a mark
    if given["layers"] < 0:
        raise UsageError(f"--layers {given['layers']}: negative; pass 0 or more blocks")
    if scales is None and "static" in (*given["inputs"], given["kv_cache"]):
        raise UsageError("--inputs or --kv-cache static: needs static scales; pass --scales")
    size = batch_size(given["batch_size"])
    from calib.scales.file import load_scales

    scale_file = None if scales is None else load_scales(scales)
    found = opened(model, given)
    require_text(found, given, "calib evaluate")
    from calib.corpus import build_blocks
    from calib.evaluation.evaluate import evaluate
    from calib.report.evaluation import print_evaluation
    from calib.report.progress import progress

    codes: dict[str, QuantizedWeight] | None = None
    if scales is not None and scale_file is not None:
        from calib.cures.restore import restore_cures, rounded_weights

        folder = scales if scales.is_dir() else scales.parent
        found = restore_cures(found, scale_file, folder)
        codes = rounded_weights(scale_file, folder)
    names = ("samples", "max_length", "seed", "add_bos")
    blocks = build_blocks(given["data"], found.tokenizer, **{name: given[name] for name in names})
    quiet = given["quiet"] or given["as_json"]
    for note in () if quiet else blocks.notes:
        click.echo(f"note: {note}", err=True)
    with progress(quiet=quiet, doing="evaluating", done="evaluated") as report:
        result = evaluate(
            found,
            blocks,
            scale_file,
            inputs=given["inputs"],
            kv_cache=given["kv_cache"],
            kv_bits=given["kv_bits"],
            convention=given["convention"],
            codes=codes,
            online=True,
            ignore=given["ignore"],
            batch_size=size,
            layer_blocks=given["layers"],
            progress=report,
        )
    print_evaluation(result, as_json=given["as_json"])
