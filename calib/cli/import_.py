# SPDX-License-Identifier: Apache-2.0
"""`calib import FILE -o DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from calib.output import output_folder, require_free

__all__ = ["command"]


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--compare", type=click.Path(path_type=Path), help="A scales.json; print where the ranges differ most.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", count=True, help="Twice shows tracebacks.")
def command(path: Path, output: Path, compare: Path | None, overwrite: bool, quiet: bool, verbose: int) -> None:
    """Read the scales of an export at PATH and write them as scales.json.

    PATH is a compressed-tensors checkpoint (also of llm-compressor), an ONNX graph with Q/DQ, or AIMET encodings. With
    --compare the published ranges are set beside those of your own measurement.
    """
    require_free(output, overwrite=overwrite, reads=[path])
    from calib.export.importing import import_scales
    from calib.report.export import print_comparison
    from calib.scales.file import load_scales, save_scales

    scales = import_scales(path)
    own = load_scales(compare) if compare is not None else None
    with output_folder(output, overwrite=overwrite) as work:
        save_scales(scales, work)
    if not quiet:
        click.echo(f"{len(scales.tensors)} tensors of {scales.method.partition(':')[2]}")
        if own is not None:
            print_comparison(scales, own)
        click.echo(f"wrote {output / 'scales.json'}")
