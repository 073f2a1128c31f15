# SPDX-License-Identifier: Apache-2.0
"""The card of a distillation: what was trained on what, how good it is, and what that does not say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.report.distill import by_seed, deployment_cells, mean_perplexity, student_label, temperature_curves

if TYPE_CHECKING:
    from calib.schema.distill import DistillReport, ModelRecipe, StudentRow

__all__ = ["write_card"]

_LARGEST_TABLE = 20
"""Classes of a confusion matrix that a page shows; `report.json` has every one."""


def write_card(report: DistillReport, folder: Path) -> Path:
    """Writes `README.md` in the form of a model card, from the report and from which files lie beside it.

    Args:
        report: of the run.
        folder: where the report is.
    """
    path = folder / "README.md"
    path.write_text("\n".join(_lines(report, folder)) + "\n", encoding="utf-8")
    return path


def _lines(report: DistillReport, folder: Path) -> Iterator[str]:
    recipe = report.recipe
    yield from ("---", "library_name: calib", f"pipeline_tag: {recipe.task}", "tags: [distillation]", "---")
    yield from (f"# {recipe.metadata.title}", "", recipe.metadata.description, "")
    data = report.data
    what, unit = f"{data['classes']} classes", "samples"
    if recipe.task == "text-generation":
        what, unit = "the class of a position is its next token", f"blocks of {recipe.data.max_length} tokens"
    yield (
        f"Data: `{recipe.data.source}`, {what}; {data['train']} {unit} to train on, {data['validation']} to choose "
        f"lambda by, {data['test']} to judge by. Nothing was chosen on test data; accuracy is that after the last step."
    )
    yield from ("", f"Teacher: {_source(recipe.teacher)}. Student: {_source(recipe.student)}. ", "")
    yield from _teachers(report)
    yield from _students(report)
    yield from _deployments(report)
    if (folder / "curves.png").exists():
        yield from ("", "![learning curves](curves.png)")
    if (folder / "eigen_cam.png").exists():
        yield from ("", "Where the teachers of the first seed look:", "", "![Eigen-CAM](eigen_cam.png)")
    yield from ("", "## What this does not say", "")
    seeds = len(recipe.seeds)
    yield (
        f"* {seeds} seed{'s' if seeds > 1 else ''}: "
        + ("no spread is known." if seeds == 1 else "differences below two standard errors may be chance.")
    )
    yield "* Accuracy holds for data like these. Bias of the data and of the teacher passes on to the student."
    if any(row.deployment for row in report.students):
        yield "* Quantized accuracy is that of fake quantization, exact in the codes; a runtime may round otherwise."
    yield from (f"* {warning}." for warning in report.warnings)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield from (
        "",
        f"Made by calib {report.producer.version} ({versions}); `report.json` holds the recipe and all rows.",
    )


def _source(model: ModelRecipe) -> str:
    if model.network is not None:
        return f"`{model.network}` with fresh weights"
    if model.fresh is not None:
        changes = ", ".join(f"{name} {value}" for name, value in model.fresh.items()) or "unchanged"
        return f"the configuration of `{model.encoder or model.model}` ({changes}) with fresh weights"
    if model.encoder is not None:
        layers = "" if model.layers is None else f", its first {model.layers} layers"
        return f"`{model.encoder}`{layers}, with a fresh head"
    return f"`{model.model}`" + (" as it is" if model.layers is None else f", {model.layers} of its layers")


def _teachers(report: DistillReport) -> Iterator[str]:
    yield from ("## Teachers", "", "| teacher | lambda | CMI, training | accuracy, test |", "|---|---|---|---|")
    for name in dict.fromkeys(row.teacher for row in report.teachers):
        rows = [row for row in report.teachers if row.teacher == name]
        strengths = ", ".join(f"{s:g}" for s in sorted({r.strength for r in rows if r.strength is not None}))
        cmi = _mean([float(row.train["cmi"] or 0) for row in rows])
        accuracy = _mean([float(row.test["accuracy"] or 0) for row in rows])
        yield f"| {name} | {strengths} | {cmi:.4f} | {accuracy:.2%} |"
    yield ""
    curves = temperature_curves(report)
    if curves:
        temperatures = [f"T {t:g}" for t, _ in next(iter(curves.values()))]
        yield from (f"| CMI, training | {' | '.join(temperatures)} |", "|---|" + "---|" * len(temperatures))
        yield from (f"| {name} | {' | '.join(f'{cmi:.4f}' for _, cmi in curve)} |" for name, curve in curves.items())
        yield ""


def _students(report: DistillReport) -> Iterator[str]:
    several = len({row.variant for row in report.students}) > 1
    groups = by_seed(report.students)
    columns = ["condition", "samples", "by", "accuracy, test", *_more(groups[0])]
    yield from ("## Students", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    for rows in groups:
        first = rows[0]
        by = student_label(first, variant=several)
        accuracy = f"{_mean([row.accuracy for row in rows]):.2%}"
        yield f"| {' | '.join([first.condition, str(first.samples), by, accuracy, *_more(rows).values()])} |"
    what = "accuracy" if groups[0][0].omitted_recall is None else "recall of omitted classes"
    for gain in report.gains:
        spread = "" if gain.standard_error is None else f" ± {gain.standard_error:.4f} (s.e.)"
        yield from (
            "",
            f"{gain.condition}, {gain.framework}: {what} by the MCMI teacher against {gain.against} "
            f"{gain.mean:+.4f}{spread}, better in {gain.wins} of {gain.seeds} seeds.",
        )
    confusing = [rows for rows in groups if rows[0].confusion is not None and rows[0].teacher in ("none", "mcmi")]
    for rows in confusing:
        yield from _confusion(rows, student_label(rows[0], variant=several), report.class_names)


def _more(rows: Sequence[StudentRow]) -> dict[str, str]:
    """Columns that only some tasks and protocols have."""
    if rows[0].log_likelihood is not None:
        return {"perplexity, test": f"{mean_perplexity(rows):.2f}"}
    if rows[0].omitted_recall is None:
        return {}
    recall = _mean([row.omitted_recall or 0.0 for row in rows])
    kept = _mean([row.kept_accuracy or 0.0 for row in rows])
    return {"recall of omitted classes": f"{recall:.2%}", "accuracy on the others": f"{kept:.2%}"}


def _confusion(rows: Sequence[StudentRow], by: str, names: list[str]) -> Iterator[str]:
    """Counts over the test data, sums over seeds: a row for each true class."""
    tables = [row.confusion for row in rows if row.confusion is not None]
    classes = range(len(names))
    if len(classes) > _LARGEST_TABLE:
        return
    yield from ("", f"{rows[0].condition}, {by}: true classes in rows, answers in columns.", "")
    yield from (f"| | {' | '.join(names)} |", "|---|" + "---|" * len(classes))
    for true in classes:
        yield f"| {names[true]} | {' | '.join(str(sum(table[true][c] for table in tables)) for c in classes)} |"


def _deployments(report: DistillReport) -> Iterator[str]:
    groups = [rows for rows in by_seed(report.students) if all(row.deployment for row in rows)]
    if not groups:
        return
    columns = ["condition", "by", *deployment_cells(groups[0])]
    yield from ("", "## Quantized", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
    for rows in groups:
        cells = [rows[0].condition, student_label(rows[0], variant=True), *deployment_cells(rows).values()]
        yield f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
