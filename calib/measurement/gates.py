# SPDX-License-Identifier: Apache-2.0
"""The conditions on a run itself, which must hold before scales are written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from calib.measurement.site import Gate, Site
from calib.sites import Port, Selection
from calib.sites.structure import cached_attentions, inner_models

__all__ = [
    "every_expert_routed",
    "every_modality",
    "every_site_fired",
    "expert_tokens",
    "finite",
    "passes_complete",
    "reached",
]

_SHOWN = 5
_EXPERT = re.compile(r"(.*\bexperts\.(?:expert_)?\d+)\.[^:]*:")


def every_site_fired(silent: Sequence[str], ports: str) -> Gate:
    """Whether every selected port was reached.

    Args:
        silent: names of those that were not.
        ports: what to say if all were.
    """
    if not silent:
        return Gate("every_site_fired", True, ports)
    return Gate(
        "every_site_fired",
        False,
        f"never reached: {_shown(silent)}; leave them out with --ignore, or use data that reaches them",
        tuple(silent),
    )


def reached(ports: int, by_weight: Iterable[str]) -> str:
    """What `every_site_fired` says if nothing is missing; what cannot be measured is named.

    Args:
        ports: how many there are.
        by_weight: modules whose weight the model uses without calling them.
    """
    names = sorted(name or "the model itself" for name in by_weight)
    unseen = f"; not measured, for the model uses the weight without the module: {_shown(names)}" if names else ""
    return f"{ports} ports{unseen}"


def every_modality(model: nn.Module, ports: Sequence[Port], selection: Selection, ran: Collection[str]) -> Gate:
    """Whether every model inside a model ran: data without images or audio leaves their tower silent.

    Args:
        model: the model.
        ports: all of its ports.
        selection: what is wanted; a tower of which nothing is wanted may be silent.
        ran: modules that ran.
    """
    wanted = {f"{port.module}." for port in ports if selection.keeps([port.name], port.kind)}
    models = [name for name in inner_models(model) if any(module.startswith(f"{name}.") for module in wanted)]
    silent = [name for name in models if not any(f"{module}.".startswith(f"{name}.") for module in ran)]
    outer = [name for name in silent if not any(name.startswith(f"{other}.") for other in silent)]
    if not outer:
        return Gate("every_modality", True, f"{len(models)} models inside" if models else "one model")
    return Gate(
        "every_modality",
        False,
        f"nothing reached {_shown(outer)}: the data has no images, audio or text for it; pass -d with some (see "
        "docs/corpus.md), or leave it out with --ignore",
        tuple(outer),
    )


def every_cache_seen(model: nn.Module, ports: Sequence[Port], selection: Selection) -> Gate:
    """Whether every attention that is given a cache has ports for keys and values; some attend in their own way."""
    layers = [name for name in cached_attentions(model) if selection.keeps([f"{name}:key"], "key")]
    seen = [f"{port.module}." for port in ports if port.port == "key"]
    # the attention may lie inside the module that is handed the cache
    unseen = [name for name in layers if not any(module.startswith(f"{name}.") for module in seen)]
    if not unseen:
        return Gate("every_cache_seen", True, f"{len(layers)} layers" if layers else "no cache")
    return Gate(
        "every_cache_seen",
        False,
        f"keys and values of {_shown(unseen)} cannot be seen: it neither calls transformers' attention functions nor "
        "`Cache.update`; leave them out with --ignore key --ignore value, and keep the cache in floating point",
        tuple(unseen),
    )


def every_expert_routed(known: Iterable[str], sites: Mapping[str, Site], fewest: int) -> Gate:
    """Whether every expert got enough tokens; those that came by force do not count.

    Args:
        known: experts that may have no site, as ``module@expert``.
        sites: what was measured; experts that are modules of their own are found there.
        fewest: tokens that an expert must get.
    """
    tokens = dict.fromkeys(known, 0) | expert_tokens(sites)
    poor = {name: count for name, count in tokens.items() if count < fewest}
    if not poor:
        return Gate("every_expert_routed", True, f"{len(tokens)} experts" if tokens else "no experts")
    forced = {f"{site.module}@{site.expert}" for site in sites.values() if site.forced}
    listed = [f"{name} ({count} tokens{', measured by force' * (name in forced)})" for name, count in poor.items()]
    return Gate(
        "every_expert_routed",
        False,
        f"fewer than {fewest} tokens: {_shown(listed)}; use more or other data, --min-expert-tokens, or --ignore",
        tuple(poor),
    )


def expert_tokens(sites: Mapping[str, Site]) -> dict[str, int]:
    """Tokens that each expert got by routing, by its first tensor: ``module@expert``, or the name of its own module."""
    first: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for site in sites.values():
        span = site.statistics.range
        count = (span.count_all + span.nonfinite_all) // max(1, site.channels)
        for expert, tensor in _experts_of(site):
            if first.setdefault(expert, tensor) == tensor:
                tokens[expert] = tokens.get(expert, 0) + (0 if site.forced else count)
    return tokens


def _experts_of(site: Site) -> Iterator[tuple[str, str]]:
    """Experts that a site is of, each with the name of the tensor without the call."""
    if site.expert is not None:
        yield f"{site.module}@{site.expert}", site.port
        return
    for name in dict.fromkeys([site.name, *site.aliases]):
        found = _EXPERT.match(name)
        if found is not None and name.partition("#")[0].endswith(":input"):
            yield found[1], name.partition("#")[0]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def finite(sites: Mapping[str, Site]) -> Gate:
    """Whether no value was NaN or infinite; the first of each site is located."""
    faulty = [(name, site.statistics) for name, site in sites.items() if site.statistics.range.nonfinite_all]
    details = []
    for name, statistics in faulty[:_SHOWN]:
        place = statistics.fault.place
        where = ", first at document {}, position {}, channel {}".format(*place) if place else ""
        details.append(f"{name}: {statistics.range.nonfinite_all} values{where}")
    if any(sites[name].dtype == "float16" for name, _ in faulty):
        details.append("float16 ends at 65,504: pass --dtype bfloat16 or float32")
    return Gate("finite", not faulty, "; ".join(details) or "no NaN, no infinity")


def passes_complete(failed: int) -> Gate:
    """Whether no forward pass broke off after some of its values had been counted."""
    detail = f"{failed} forward passes raised after some of their values had been counted" if failed else ""
    return Gate("complete_passes", not failed, detail or "no pass broke off")
