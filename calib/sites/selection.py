# SPDX-License-Identifier: Apache-2.0
"""Which sites a user asked for: names, kinds, globs and regular expressions."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from calib.errors import UsageError
from calib.sites.port import KINDS, Port

__all__ = ["Selection"]


class Selection:
    """What to measure and what to leave out.

    A pattern is a kind (``residual``), a module (``model.layers.3.mlp``), a glob over names (``*.down_proj:input``) or,
    after ``re:``, a regular expression that must match at the start of a name. Without one, all sites are wanted.

    Args:
        wanted: patterns of sites to measure.
        ignored: patterns of sites to leave out; they win.

    Raises:
        UsageError: a pattern is no valid regular expression.
    """

    def __init__(self, wanted: Iterable[str] = (), ignored: Iterable[str] = ()) -> None:
        self.wanted, self.ignored = tuple(wanted), tuple(ignored)
        for option, pattern in self._patterns():
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise UsageError(
                        f"{option} {pattern}: no regular expression ({error}); escape special characters"
                    ) from None

    def check(self, ports: Sequence[Port]) -> None:
        """Raises `UsageError` naming a pattern that can match no port."""
        for option, pattern in self._patterns():
            if any(_matches(pattern, p.name, p.kind) for p in ports):
                continue
            near = difflib.get_close_matches(pattern, [*KINDS, *(p.name for p in ports)], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`calib sites MODEL` lists all names"
            raise UsageError(f"{option} {pattern}: matches no site of this model; {hint}")

    def keeps(self, names: Sequence[str], kind: str, others: Iterable[str] = ()) -> bool:
        """Whether a tensor is measured.

        Args:
            names: its own and its aliases; patterns may match any of them.
            kind: the kind that names it.
            others: its kinds under its aliases. A tensor is wanted under each of its kinds, for the input of a
                projection mostly is the output of a norm, but left out only under the one that names it.
        """

        def any_of(patterns: tuple[str, ...], kinds: tuple[str, ...]) -> bool:
            return any(_matches(pattern, name, k) for pattern in patterns for name in names for k in kinds)

        return (not self.wanted or any_of(self.wanted, (kind, *others))) and not any_of(self.ignored, (kind,))

    def _patterns(self) -> list[tuple[str, str]]:
        return [("--sites", p) for p in self.wanted] + [("--ignore", p) for p in self.ignored]


def _matches(pattern: str, name: str, kind: str) -> bool:
    if pattern in KINDS:
        return pattern == kind
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    module = name.partition(":")[0]
    return fnmatch.fnmatchcase(name, pattern) or module == pattern or module.startswith(pattern + ".")
