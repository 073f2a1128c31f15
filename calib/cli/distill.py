# SPDX-License-Identifier: Apache-2.0
"""`calib distill cmi` and `calib distill run`."""

from __future__ import annotations

from typing import Any

import click

from calib.cli.options import model_options, output_options

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
    **given: Any,
) -> None:
    """Print CMI, separation, NCMI, log-likelihood, accuracy and ECE of a classifier over a data set.

    DATA is a folder with one folder of images per class, a folder of IDX files as MNIST's, a folder with SPLIT.jsonl,
    .csv, .tsv or .parquet (fields text and label) or SPLIT.safetensors (inputs and labels), one such file, or a hub
    data set.
    """
    from dataclasses import replace

    from calib.distill.classifier import open_classifier
    from calib.distill.cmi import measure_information
    from calib.distill.data import read_records, stratified_share
    from calib.report.distill import print_information

    records = read_records(data, split)
    if samples is not None and samples < len(records):
        records = records.select(stratified_share(records.labels, samples / len(records), seed))
    names = ("revision", "task", "dtype", "device", "trust_remote_code")
    classifier = replace(open_classifier(model, **{name: given[name] for name in names}), max_length=max_length)
    loader = classifier.loader(classifier.dataset(records), batch_size=batch_size)
    found = measure_information(classifier.model, loader, task=classifier.task, temperatures=temperatures)
    print_information(model, f"{data} ({split})", [one.summary() for one in found], as_json=given["as_json"])
