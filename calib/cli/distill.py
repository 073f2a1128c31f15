# SPDX-License-Identifier: Apache-2.0
"""`calib distill cmi` and `calib distill run`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.cli.options import model_options, output_options
from calib.errors import ArtifactError, Interrupted, UsageError

if TYPE_CHECKING:
    from calib.models import OpenedModel
    from calib.schema.distill import DistillRecipe, DistillReport

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
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a text; 128, or what it was trained with.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of samples.")
@click.option("--row-memory", default=1000, show_default=True, help="MB for centroids of a language model.")
@model_options
@output_options
def cmi(model: str, **given: Any) -> None:
    """Print CMI, separation, NCMI, log-likelihood, accuracy and ECE of a classifier over a data set.

    DATA is a folder with one folder of images or .wav files per class, a folder of IDX files as MNIST's, a folder with
    SPLIT.jsonl, .csv, .tsv or .parquet (fields text, image or audio, and label) or SPLIT.safetensors (inputs and
    labels), one such file, or a hub data set. For a causal language model DATA is text as for `calib measure`, the
    class of a position is its next token, rare tokens share centroids, and the CMI is an upper bound.
    """
    from dataclasses import replace

    from calib.distill.classifier import classifier_of
    from calib.distill.cmi import measure_information
    from calib.distill.data import read_records, stratified_share
    from calib.distill.folders import is_kept, load_kept
    from calib.models import open_model
    from calib.report.distill import print_information

    if is_kept(model):
        classifier = load_kept(Path(model), given["device"])
    else:
        names = ("revision", "task", "dtype", "device", "trust_remote_code")
        opened = open_model(model, **{name: given[name] for name in names})
        if opened.task == "text-generation":
            _language_cmi(opened, model, given)
            return
        classifier = classifier_of(opened, model)
    records = read_records(given["data"], given["split"])
    samples = given["samples"]
    if samples is not None and samples < len(records):
        records = records.select(stratified_share(records.labels, samples / len(records), given["seed"]))
    classifier = replace(classifier, max_length=given["max_length"] or classifier.max_length)
    loader = classifier.loader(classifier.dataset(records), batch_size=given["batch_size"])
    found = measure_information(classifier.model, loader, task=classifier.task, temperatures=given["temperatures"])
    name = f"{given['data']} ({given['split']})"
    print_information(model, name, [one.summary() for one in found], as_json=given["as_json"])


def _language_cmi(opened: OpenedModel, model: str, given: dict[str, Any]) -> None:
    from calib.corpus import build_blocks
    from calib.distill.language import language_information
    from calib.report.distill import print_information

    data, temperatures = given["data"], given["temperatures"]
    size = {"samples": given["samples"] or 128, "max_length": given["max_length"] or 128, "seed": given["seed"]}
    found, grouping = language_information(
        opened.model,
        build_blocks([data], opened.tokenizer, **size),
        batch_size=given["batch_size"],
        temperatures=temperatures,
        memory_bytes=given["row_memory"] * 1_000_000 // len(temperatures),
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
@click.option("--resume", is_flag=True, help="Go on with a run of this recipe that was broken off.")
@output_options
def run(
    config: Path, output: Path, device: str, resume: bool, *, overwrite: bool, as_json: bool, quiet: bool, verbose: int
) -> None:
    """Train or open a teacher, fine-tune it to MCMI beside its control, train students, and compare.

    Writes report.json, README.md (a model card), log.csv and curves.png (losses), teachers and students of the first
    seed and, for images, a picture of where teachers look. Checkpoints are kept beside OUTPUT until the run is
    complete: after a kill --resume comes to the same result. Several GPUs: accelerate launch -m calib distill run ...
    """
    from calib.distill.ranks import Ranks
    from calib.distill.run import run_recipe
    from calib.output import output_folder, require_free
    from calib.report.distill import print_report
    from calib.report.progress import progress_lines
    from calib.report.terminal import print_json

    recipe = _recipe(config)
    if int(os.environ.get("RANK", "0")):  # one of several processes, and not the one that writes
        ranks = Ranks(cpu=device == "cpu")
        ranks.wait()
        with tempfile.TemporaryDirectory() as folder:
            run_recipe(recipe, Path(folder), device=device, work=_checkpoints(output))
        ranks.leave()
        return
    require_free(output, overwrite=overwrite)
    work = _work_folder(output, recipe, resume=resume, overwrite=overwrite)
    ranks = Ranks(cpu=device == "cpu")
    ranks.wait()
    try:
        with (
            progress_lines(quiet=quiet or as_json, verbose=bool(verbose)) as progress,
            output_folder(output, overwrite=overwrite) as folder,
        ):
            report = run_recipe(recipe, folder, device=device, progress=progress, work=work)
            _picture_and_card(report, folder)
    except KeyboardInterrupt:
        raise Interrupted(f"{output}: interrupted; what was trained is kept, --resume goes on from there") from None
    finally:
        # nothing to go on from: a run that failed before its first checkpoint leaves nothing behind
        if not any(work.rglob("*.safetensors")):
            shutil.rmtree(work)
    shutil.rmtree(work, ignore_errors=True)
    ranks.leave()
    if as_json:
        print_json(output / "report.json")
    elif not quiet:
        print_report(report)
        click.echo(f"written: {output / 'report.json'}")


def _checkpoints(output: Path) -> Path:
    return output.absolute().with_name(f"{output.absolute().name}.checkpoints")


def _work_folder(output: Path, recipe: DistillRecipe, *, resume: bool, overwrite: bool) -> Path:
    """The folder of the checkpoints, which holds the recipe that they are of."""
    work = _checkpoints(output)
    record, text = work / "recipe.json", recipe.model_dump_json(indent=1) + "\n"
    if work.exists():
        if not work.is_dir() or (any(work.iterdir()) and not record.is_file()):
            raise UsageError(f"{work}: is no folder of checkpoints, which would lie there; choose another --output")
        if resume and record.exists() and record.read_text(encoding="utf-8") != text:
            raise ArtifactError(f"{work}: is of another recipe; pass the recipe that it holds, or remove it")
        if not (resume or overwrite):
            raise UsageError(f"{work}: a run was broken off; --resume goes on with it, --overwrite starts anew")
        if not resume:
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    record.write_text(text, encoding="utf-8")
    return work


def _picture_and_card(report: DistillReport, folder: Path) -> None:
    from calib.distill.training_log import FILE, read_log
    from calib.report.curves import draw_curves
    from calib.report.distill_card import write_card

    try:
        left_out = draw_curves(read_log(folder / FILE), folder / "curves.png")
        if left_out:
            click.echo(f"curves.png: no room for {len(left_out)} kinds of training; {FILE} has them all", err=True)
    except (UsageError, ArtifactError) as error:
        click.echo(f"no picture of the learning curves: {error}", err=True)
    write_card(report, folder)


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
