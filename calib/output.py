# SPDX-License-Identifier: Apache-2.0
"""Output folders appear whole or not at all, and take the place of nothing but what calib wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.errors import ArtifactError, UsageError

__all__ = ["output_folder", "require_free"]


def require_free(path: Path, *, overwrite: bool, reads: Iterable[str | Path] = ()) -> None:
    """Checks, before any work is done, that a result can be written to `path`.

    Args:
        path: the folder to write; a link is one to the folder that it names.
        overwrite: replace what calib wrote there before; anything else is never replaced.
        reads: what the work reads; never replaced.

    Raises:
        UsageError: it exists and is not to be overwritten, was not written by calib, is no folder, is the current
            folder or a mounted one, holds what is read, or its parent cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, not a folder; choose another --output")
    for source in map(Path, reads):
        if source.exists() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"{path}: would replace {source}, which is read; choose another --output")
    if path.is_dir() and any(path.iterdir()):
        if not _is_ours(path):
            raise UsageError(f"{path}: was not written by calib, not even --overwrite replaces it; choose another -o")
        if not overwrite:
            raise UsageError(f"{path}: exists and is not empty; choose another --output or pass --overwrite")
    if path.is_dir() and (path.is_mount() or path.resolve() in (Path.cwd(), *Path.cwd().parents)):
        # a folder appears whole by taking the place of another one, which these cannot give up
        raise UsageError(f"{path}: is mounted or the current folder; choose a folder inside of it as --output")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{path}: {parent} is a file, not a folder; choose another --output")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: {parent} is not writable; choose another --output")


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` that takes its place when the block ends without an error.

    A reader sees the old folder, or none, until the new one is complete. An error leaves everything as it was. A link
    stays, and names the new folder.

    Raises:
        UsageError: see `require_free`.
        ArtifactError: the disk is full or fails.
    """
    require_free(path, overwrite=overwrite)
    path = path.resolve()
    beside = path.parent
    work: Path | None = None
    try:
        beside.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=beside))
        yield work
        work.chmod(0o755)
        if path.exists():
            _exchange(work, path)
        else:
            work.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ArtifactError(
                f"{path}: the disk is full, nothing was written; free some space or choose another --output"
            ) from error
        raise ArtifactError(
            f"{path}: cannot be written ({error.strerror or error}); choose another --output"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Puts a folder in the place of another, which comes back if that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        old = path.replace(aside / "old")
        try:
            new.replace(path)
        except OSError:
            old.replace(path)
            raise
    finally:
        # what could not be put back is never deleted
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether calib wrote a folder: one of its records lies at the top, for every command writes one."""
    return any(_is_record(path) for path in folder.glob("*.json") if path.is_file())


def _is_record(path: Path) -> bool:
    """Whether a file is calib's: it names its format, or, in the fields of others, who wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    foreign = content.get("calib")  # of published protocols
    return str(content.get("format")).startswith("calib.") or (isinstance(foreign, dict) and "producer" in foreign)
