# SPDX-License-Identifier: Apache-2.0
"""`calib distill cmi` and `calib distill run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.options import model_options, output_options
from calib.errors import UsageError

if TYPE_CHECKING:
    from calib.models import OpenedModel
    from calib.schema.distill import DistillRecipe

__all__ = ["command"]


@click.group("distill")
def command() -> None:
    """Measure what a teacher knows about its inputs (CMI), raise it, and train students."""


@command.command("cmi")
@click.argument("model")
@click.option("-d", "--data", required=True, help="Labelled data: hub:OWNER/NAME[@CONFIG], folder or file.")
@click.option("--split", default="test", show_default=True, help="Part of the data.")
@click.option("--samples", default=None, type=click.IntRange(min=1), help="At most so many, stratified.")
@click.option("--temperature", "temperatures", multiple=True, type=float, default=(1.0,), show_default=True)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--max-length", default=128, show_default=True, help="Tokens of a text.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of samples.")
@click.option("--row-memory", default=1000, show_default=True, help="MB for centroids of a language model.")
@model_options
@output_options
def cmi(
    model: str,
    data: str,
    split: str,
    samples: int | None,
    temperatures: tuple[float, ...],
    batch_size: int,
    max_length: int,
    seed: int,
    row_memory: int,
    **given: Any,
) -> None:
    """Print CMI, separation, NCMI, log-likelihood, accuracy and ECE of a classifier over a data set.

    DATA is a folder with one folder of images per class, a folder of IDX files as MNIST's, a folder with SPLIT.jsonl,
    .csv, .tsv or .parquet (fields text and label) or SPLIT.safetensors (inputs and labels), one such file, or a hub
    data set. For a causal language model DATA is text as for `calib measure`, the class of a position is its next
    token, rare tokens share centroids, and the CMI is an upper bound.
    """
    from dataclasses import replace

    from calib.distill.classifier import classifier_of, is_network, load_network
    from calib.distill.cmi import measure_information
    from calib.distill.data import read_records, stratified_share
    from calib.models import open_model
    from calib.report.distill import print_information

    if is_network(model):
        classifier = load_network(Path(model), given["device"])
    else:
        names = ("revision", "task", "dtype", "device", "trust_remote_code")
        opened = open_model(model, **{name: given[name] for name in names})
        if opened.task == "text-generation":
            _language_cmi(opened, model, data, samples, temperatures, batch_size, max_length, seed, row_memory, given)
            return
        classifier = classifier_of(opened, model)
    records = read_records(data, split)
    if samples is not None and samples < len(records):
        records = records.select(stratified_share(records.labels, samples / len(records), seed))
    classifier = replace(classifier, max_length=max_length)
    loader = classifier.loader(classifier.dataset(records), batch_size=batch_size)
    found = measure_information(classifier.model, loader, task=classifier.task, temperatures=temperatures)
    print_information(model, f"{data} ({split})", [one.summary() for one in found], as_json=given["as_json"])


def _language_cmi(
    opened: OpenedModel,
    model: str,
    data: str,
    samples: int | None,
    temperatures: tuple[float, ...],
    batch_size: int,
    max_length: int,
    seed: int,
    row_memory: int,
    given: dict[str, Any],
) -> None:
    from calib.corpus import build_blocks
    from calib.distill.language import language_information
    from calib.report.distill import print_information

    blocks = build_blocks([data], opened.tokenizer, samples=samples or 128, max_length=max_length, seed=seed)
    found, grouping = language_information(
        opened.model,
        blocks,
        batch_size=batch_size,
        temperatures=temperatures,
        memory_bytes=row_memory * 1_000_000 // len(temperatures),
    )
    print_information(model, data, [one.summary() for one in found], as_json=given["as_json"])
    if not given["as_json"]:
        click.echo(
            f"{grouping.rows} centroid rows, at most {grouping.memory_bytes * len(temperatures) / 1e6:.0f} MB; "
            f"{grouping.own_share:.1%} of the positions have a row of their own, so CMI is an upper bound"
        )


@command.command("run")
@click.option("-c", "--config", required=True, type=click.Path(path_type=Path), help="Recipe (YAML).")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@output_options
def run(config: Path, output: Path, device: str, *, overwrite: bool, as_json: bool, quiet: bool, verbose: int) -> None:
    """Train or open a teacher, fine-tune it to MCMI beside its control, train students, and compare.

    Writes report.json, the teachers of the first seed and, for images, a picture of where they look.
    """
    from calib.distill.run import run_recipe
    from calib.output import output_folder, require_free
    from calib.report.distill import print_report
    from calib.report.terminal import print_json

    recipe = _recipe(config)
    require_free(output, overwrite=overwrite)

    def progress(line: str) -> None:
        if not quiet and not as_json and (verbose or " epoch " not in line):
            click.echo(line, err=True)

    with output_folder(output, overwrite=overwrite) as folder:
        report = run_recipe(recipe, folder, device=device, progress=progress)
    if as_json:
        print_json(output / "report.json")
    elif not quiet:
        print_report(report)
        click.echo(f"written: {output / 'report.json'}")


def _recipe(path: Path) -> DistillRecipe:
    import yaml
    from pydantic import ValidationError

    from calib.schema.distill import DistillRecipe

    try:
        return DistillRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); pass a recipe, see recipes/distill/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is no YAML ({' '.join(str(error).split())}); see recipes/distill/") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"{path}: {where}: {first['msg']}; see recipes/distill/ for examples") from error
