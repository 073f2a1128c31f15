# SPDX-License-Identifier: Apache-2.0
"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
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
        path: the folder to write.
        overwrite: replace what is there.
        reads: what the work reads; never replaced.

    Raises:
        UsageError: it exists and is not to be overwritten, is no folder, holds what is read, or its parent cannot be
            written.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, not a folder; choose another --output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path}: exists and is not empty; choose another --output or pass --overwrite")
    for source in map(Path, reads):
        if source.exists() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"{path}: would replace {source}, which is read; choose another --output")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{path}: {parent} is a file, not a folder; choose another --output")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: {parent} is not writable; choose another --output")


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` that takes its place when the block ends without an error.

    A reader sees the old folder, or none, until the new one is complete. An error leaves everything as it was.

    Raises:
        UsageError: see `require_free`.
        ArtifactError: the disk is full or fails.
    """
    require_free(path, overwrite=overwrite)
    beside = path.absolute().parent
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
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
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
