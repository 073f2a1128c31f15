# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with tokens per second and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress", "progress_lines"]

_LOG_SECONDS = 15.0


@contextmanager
def progress(
    *, quiet: bool = False, doing: str = "measuring", done: str = "measured"
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (tokens done, tokens in all); the words say what is done to them."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        yield from _bar(doing)
    else:
        yield _log(done)


def _bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=None, rate="")
        begin = time.perf_counter()

        def report(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - begin, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} tokens/s")

        yield report


def _log(word: str) -> Callable[[int, int], None]:
    begin = last = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < _LOG_SECONDS and done < total:
            return
        last = now
        rate = done / max(now - begin, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        sys.stderr.write(f"{word} {done:,} of {total:,} tokens, {rate:,.0f} tokens/s, {left:.0f} s left\n")

    return report


@contextmanager
def progress_lines(*, quiet: bool = False, verbose: bool = False) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with lines; those about an epoch come and go on a terminal, and rarely in a log.

    Args:
        quiet: no line at all.
        verbose: every line stays.
    """
    if quiet:
        yield lambda line: None
    elif sys.stderr.isatty() and not verbose:
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        with console.status("") as status:

            def show(line: str) -> None:
                if " epoch " in line:
                    status.update(line)
                else:
                    console.print(line, markup=False)

            yield show
    else:
        last = -_LOG_SECONDS

        def write(line: str) -> None:
            nonlocal last
            now = time.perf_counter()
            if " epoch " in line and not verbose:
                if now - last < _LOG_SECONDS:
                    return
                last = now
            sys.stderr.write(line + "\n")

        yield write
