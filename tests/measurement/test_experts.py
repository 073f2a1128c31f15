# SPDX-License-Identifier: Apache-2.0
"""Experts are measured one by one, fused or not, on the tokens that they are given and on no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import tiny_models
from calib.corpus import TokenBlocks
from calib.measurement import Calibration, Measurement, MeasureOptions, Site, measure
from calib.models import OpenedModel
from calib.statistics import SiteStatistics

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EXPERTS = "model.layers.1.mlp.experts"


def tensors(statistics: SiteStatistics) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in statistics.to_tensors().items()}


def moe(implementation: str = "grouped_mm", class_name: str = "Qwen3MoeForCausalLM") -> nn.Module:
    model = tiny_models.build(class_name, "")
    model.config._experts_implementation = implementation  # type: ignore[union-attr]
    return model


def measured(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> Calibration:
    with torch.no_grad(), Calibration(model) as calibration:
        model(ids, **inputs)
    return calibration


def ids_of(rows: int = 3, tokens: int = 17) -> torch.Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(5))


def tokens_of(site: Site) -> int:
    return site.statistics.range.count_all // site.channels


def without_tokens(model: nn.Module, expert: int) -> nn.Module:
    """The router of layer 1 never chooses one expert."""
    model.get_submodule("model.layers.1.mlp.router").bias.data[expert] = -1e9
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_way_to_compute_experts_shows_the_same_rows(implementation: str) -> None:
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    calibration = measured(moe(implementation), ids, attention_mask=mask)
    sites, expected = calibration.sites(), measured(moe("eager"), ids, attention_mask=mask).sites()
    assert {n for n, s in sites.items() if s.expert is not None} == {
        n for n, s in expected.items() if s.expert is not None
    }
    first = [name for name in sites if name.startswith("model.layers.0.mlp.experts:input@")]
    assert first
    for name in first:
        assert tensors(sites[name].statistics) == tensors(expected[name].statistics)
    for name, site in sites.items():
        if site.expert is not None:
            assert site.statistics.range.amax == pytest.approx(expected[name].statistics.range.amax, rel=1e-5)
    assert sum(tokens_of(sites[name]) for name in first) == 2 * int(mask.sum())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_experts_keep_their_document_and_position(implementation: str) -> None:
    """The largest input of each expert is found again where its place says."""
    model, ids = moe(implementation), ids_of()
    held: list[torch.Tensor] = []
    handle = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda module, args: held.append(args[0].clone()))
    sites = measured(model, ids).sites()
    handle.remove()
    rows = held[0].reshape(3, 17, -1)
    for site in sites.values():
        if site.name.startswith(f"{EXPERTS}:input@"):
            peaks = site.statistics.peaks
            assert peaks is not None
            for i in range(5):
                place = (int(peaks.document[i]), int(peaks.position[i]), int(peaks.channel[i]))
                assert rows[place].item() == peaks.value[i]
                assert int(ids[place[0], place[1]]) == peaks.token_id[i]


def test_an_expert_without_tokens_closes_the_gate_by_name() -> None:
    model = without_tokens(moe(class_name="GptOssForCausalLM"), 2)
    (gate,) = (g for g in measured(model, ids_of()).gates() if g.name == "every_expert_routed")
    assert not gate.passed
    assert gate.names == (f"{EXPERTS}@2",)
    assert f"{EXPERTS}@2 (0 tokens)" in gate.detail


def test_an_expert_with_few_tokens_closes_the_gate_if_more_are_asked_for() -> None:
    model, ids = moe(), ids_of()
    with torch.no_grad(), Calibration(model, min_expert_tokens=30) as calibration:
        model(ids)
    counts = {s.name: tokens_of(s) for s in calibration.sites().values() if ":input@" in s.name}
    few = {name.replace(":input", "") for name, count in counts.items() if count < 30}
    (gate,) = (g for g in calibration.gates() if g.name == "every_expert_routed")
    assert 0 < len(few) < len(counts)
    assert set(gate.names) == few


def test_forced_experts_are_marked_and_change_nothing_else() -> None:
    model, ids = without_tokens(moe(class_name="GptOssForCausalLM"), 2), ids_of()
    plain = measured(model, ids)
    with torch.no_grad():
        expected = model(ids).logits
        with Calibration(model, force_experts=True) as calibration:
            assert torch.equal(model(ids).logits, expected)
    sites = calibration.sites()
    forced = {name for name, site in sites.items() if site.forced}
    assert forced == {f"{EXPERTS}:{port}@2" for port in ("input", "gate_up", "hidden", "output")}
    assert all(tokens_of(sites[name]) == 51 for name in forced)
    others = plain.sites()
    assert sites.keys() - forced == others.keys()
    for name, site in others.items():
        assert tensors(site.statistics) == tensors(sites[name].statistics)
    (gate,) = (g for g in calibration.gates() if g.name == "every_expert_routed")
    assert "measured by force" in gate.detail
    assert not gate.passed


def test_an_error_among_experts_leaves_nothing_behind() -> None:
    model = moe()
    handle = model.get_submodule(EXPERTS).register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), Calibration(model):
        model(ids_of())
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Mixture(nn.Module):
    """One module per expert, as before transformers 5; the router goes by the token id."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        flat, out = x.view(-1, 6), torch.zeros_like(x.view(-1, 6))
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(ids.view(-1) % 3 == number)
            if chosen.numel():
                out.index_add_(0, chosen, expert(flat[None, chosen].reshape(-1, 6)))
        return out.view_as(x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(9, 6), Mixture()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.mlp(self.embed(input_ids), input_ids)


def test_experts_that_are_modules_never_see_padding_and_keep_positions() -> None:
    torch.manual_seed(0)
    model = Whole()
    ids = torch.tensor([[0, 3, 4, 5, 6, 7], [1, 4, 2, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad(), Calibration(model) as calibration:
        model(input_ids=ids, attention_mask=mask)
    found = {name: site for site in calibration.sites().values() for name in (site.name, *site.aliases)}
    counts = {j: tokens_of(found[f"mlp.experts.{j}.down:input"]) for j in range(3)}
    assert counts == {j: int(((ids % 3 == j) & (mask == 1)).sum()) for j in range(3)}
    peaks = found["mlp.experts.1.up:input"].statistics.peaks
    assert peaks is not None
    for document, position, token in zip(peaks.document, peaks.position, peaks.token_id, strict=True):
        assert int(ids[document, position]) == token


def only_batches(blocks: TokenBlocks, ids: np.ndarray[Any, Any]) -> TokenBlocks:
    return replace(blocks, input_ids=ids, lengths=np.full(len(ids), ids.shape[1]), document=np.arange(len(ids)),
                   domain=np.zeros(len(ids), np.int64))  # fmt: skip


@pytest.fixture
def opened(llama: OpenedModel) -> OpenedModel:
    return replace(llama, model=moe(class_name="MixtralForCausalLM"), tokenizer=None)


def test_an_expert_that_one_shard_alone_reaches_is_in_the_whole(opened: OpenedModel, blocks: TokenBlocks) -> None:
    """Two tokens per block: no shard reaches all experts."""
    corpus = only_batches(blocks, np.array([[5, 9], [21, 17], [33, 60], [71, 2]]))
    options = MeasureOptions(batch_size=1, weights=False)
    whole = measure(opened, corpus, options)
    shards = [measure(opened, corpus, replace(options, shard=(i, 4))) for i in range(4)]
    assert len({tuple(shard.sites) for shard in shards}) > 1
    merged = shards[2].merge(shards[0]).merge(shards[3].merge(shards[1]))
    assert list(merged.sites) == list(whole.sites)
    assert merged.sha256 == whole.sha256
    assert {g.name: (g.passed, sorted(g.names)) for g in merged.gates} == {
        g.name: (g.passed, sorted(g.names)) for g in whole.gates
    }


def test_experts_are_the_same_after_a_round_trip(opened: OpenedModel, blocks: TokenBlocks, tmp_path: Path) -> None:
    whole = measure(opened, only_batches(blocks, ids_of(2, 20).numpy()), MeasureOptions(weights=False))
    whole.save(tmp_path / "m")
    loaded = Measurement.load(tmp_path / "m")
    assert loaded.sha256 == whole.sha256
    for name, site in whole.sites.items():
        assert replace(loaded.sites[name], statistics=site.statistics, parts={}).__dict__ == site.__dict__
    assert loaded.gates == whole.gates
