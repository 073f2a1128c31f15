# SPDX-License-Identifier: Apache-2.0
"""Joins the sites of two shards: data decides which experts and branches a shard reaches, so one may lack some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from calib.errors import ArtifactError
from calib.measurement.gates import every_expert_routed, every_site_fired
from calib.measurement.site import Gate, Site
from calib.schema.provenance import RunProvenance

__all__ = ["merged_gates", "merged_sites", "plan_gate"]


_REACHES = ("every_site_fired", "every_modality")


def merged_sites(mine: Mapping[str, Site], theirs: Mapping[str, Site]) -> dict[str, Site]:
    """All sites of both, in module order; a site of both holds the values of both.

    Two are one site if they have the same name, or one has the other's name among its aliases: a reader that one shard
    never reached. Values of an expert by force count only if no shard routed anything to it.

    Raises:
        ArtifactError: one tensor of one shard is two of the other, or a site changed its channels, dtype or kind.
    """
    merged = dict(mine)
    for other in theirs.values():
        own = {name for name in _names(other) if name in merged} | {
            name for name, site in mine.items() if other.name in site.aliases and name in merged
        }
        if len(own) > 1:
            raise ArtifactError(
                f"merge: {other.name} is one tensor in one measurement and {' and '.join(sorted(own))} in the other; "
                "merge shards of one plan only"
            )
        if not own:
            merged[other.name] = other
            continue
        site = merged.pop(own.pop())
        joined = _joined(site, other)
        merged[joined.name] = joined
    ordered = list(merged.values())
    if all(site.order for site in ordered):  # files of version 1.0 do not tell it
        ordered.sort(key=lambda site: (site.order, site.name))
    return {site.name: site for site in ordered}


def _names(site: Site) -> list[str]:
    return [site.name, *(name for name in site.aliases if name != site.name)]


def _joined(site: Site, other: Site) -> Site:
    for what in ("channels", "dtype"):
        if getattr(site, what) != getattr(other, what):
            raise ArtifactError(
                f"merge: {site.name} has {getattr(site, what)} {what} in one measurement and {getattr(other, what)} in "
                "the other; merge shards of one plan only"
            )
    if site.forced != other.forced:
        return other if site.forced else site
    base = site if len(_names(site)) >= len(_names(other)) else other
    parts = dict(site.parts)
    for name, statistics in other.parts.items():
        parts[name] = parts[name].merge(statistics) if name in parts else statistics
    return replace(base, statistics=site.statistics.merge(other.statistics), parts=dict(sorted(parts.items())))


def merged_gates(
    mine: Sequence[Gate], theirs: Sequence[Gate], sites: Mapping[str, Site], run: RunProvenance
) -> list[Gate]:
    """The gates of the whole: what one shard reached counts for both, the plan is complete if both together are."""
    others = {gate.name: gate for gate in theirs}
    return [_merged_gate(gate, others.get(gate.name, gate), sites, run) for gate in mine]


def _merged_gate(gate: Gate, other: Gate, sites: Mapping[str, Site], run: RunProvenance) -> Gate:
    if gate.name == "plan_complete":
        return plan_gate(run)
    if gate.name == "every_expert_routed":
        return every_expert_routed([*gate.names, *other.names], sites, run.min_expert_tokens)
    failed = [g for g in (gate, other) if not g.passed]
    if not failed:
        return gate
    return _reached_together(gate, other) if gate.name in _REACHES else failed[0]


def _reached_together(gate: Gate, other: Gate) -> Gate:
    """What one part reached is reached; at least one of the gates failed."""
    if gate.passed or other.passed:
        return gate if gate.passed else other
    if not (gate.names and other.names):  # files of version 1.0 have no names
        return gate
    common = sorted({*gate.names} & {*other.names})
    if gate.name == "every_site_fired":
        return every_site_fired(common, "every port in one part or the other")
    return gate if common else Gate(gate.name, True, "all in one part or the other")


def plan_gate(run: RunProvenance) -> Gate:
    """Whether all batches of the frozen plan were run."""
    done, planned = len(run.batches), run.planned_batches
    detail = f"{done} of {planned} batches" + ("" if done == planned else "; run and merge the others")
    return Gate("plan_complete", done == planned, detail)
