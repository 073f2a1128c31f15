# SPDX-License-Identifier: Apache-2.0
"""`find_residual`: what reads and what writes the residual stream of a language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from calib.cures.linear import columns_of, is_linear
from calib.cures.pairs import Pairs
from calib.cures.relation import probe_scales, same
from calib.cures.rotation import Rotation
from calib.cures.rules import Rule, producer_rule
from calib.cures.scope import capture_scopes, example_inputs
from calib.cures.stream_probe import StreamProbe
from calib.errors import ModelError
from calib.sites.structure import Structure, is_norm

__all__ = ["Reader", "ResidualStream", "find_residual"]


@dataclass(frozen=True)
class Reader:
    """A norm that reads the stream, and all linear layers that read the norm.

    Attributes:
        norm: fully qualified name.
        rule: how it multiplies by its weight.
        consumers: names of linear layers; each reads the norm's channels in their order.
    """

    norm: str
    rule: Rule
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class ResidualStream:
    """All that touches the residual stream of one model.

    Attributes:
        width: channels.
        embedding: writes it first.
        readers: norms in order of execution; the last one feeds the output head.
        writers: linear layers whose output is added to it.
        tied: whether embedding and head share their weight.
        places: other embeddings that are added to the first one, as those of learned positions.
        keeps_mean: whether a norm subtracts the mean over the channels, which a rotation then has to keep.
    """

    width: int
    embedding: str
    readers: tuple[Reader, ...]
    writers: tuple[str, ...]
    tied: bool
    places: tuple[str, ...] = ()
    keeps_mean: bool = False

    @property
    def head(self) -> str:
        """The output head."""
        (head,) = self.readers[-1].consumers
        return head


def find_residual(
    model: nn.Module, pairs: Pairs, example: torch.Tensor | Mapping[str, torch.Tensor] | None = None
) -> ResidualStream:
    """Finds the residual stream of a language model. The model is only run; nothing in it is changed.

    Args:
        model: a transformers model with an output head.
        pairs: of this model.
        example: see `find_pairs`.

    Raises:
        ModelError: something reads or writes the stream that no rotation can be folded into; the message names it.
    """
    inputs = example if isinstance(example, Mapping) else example_inputs(model, example)
    structure = Structure.of(model)
    embedding, head, width = _ends(model, structure)
    readers: list[Reader] = []
    writers: list[str] = []
    centred = False
    for scope in capture_scopes(model, inputs):
        probe = StreamProbe(scope, width)
        rules = {}
        for name in probe.norms():
            rules[name], subtracts = _rotatable(name, model.get_submodule(name), width)
            centred |= subtracts
        readers += [_reader(name, rule, pairs, width) for name, rule in rules.items()]
        probe.check()
        writers += probe.writers()
    norm, places = _outside(model, structure, (embedding, head), width)
    rule, subtracts = _rotatable(norm, model.get_submodule(norm), width)
    readers.append(Reader(norm, rule, (head,)))
    tied = model.get_submodule(head).get_parameter("weight") is model.get_submodule(embedding).get_parameter("weight")
    return ResidualStream(width, embedding, tuple(readers), tuple(writers), tied, places, centred or subtracts)


def _rotatable(name: str, norm: nn.Module, width: int) -> tuple[Rule, bool]:
    """How a norm multiplies by its weight, and whether it subtracts the mean.

    Without weight and bias it must commute with a rotation, if it subtracts the mean with one that keeps that.
    """
    norm = copy.deepcopy(norm).float().cpu()
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    rule = producer_rule(norm, ((x,), {}), torch.from_numpy(probe_scales(width, seed=2)).float())
    bare = {
        key: torch.zeros_like(p) if key == "bias" or rule == "norm_plus_one" else torch.ones_like(p)
        for key, p in norm.named_parameters()
    }
    for keeps_mean in (False, True):
        rotation = Rotation(width, seed=1, keeps_mean=keeps_mean)
        with torch.no_grad():
            plain, turned = (functional_call(norm, bare, t) for t in (x, rotation.rotate(x)))
        if same([rotation.rotate(plain)], [turned]):
            break
    else:
        raise ModelError(f"{name}: {type(norm).__name__} does not commute with a rotation; rotate inputs online")
    if rule is None:
        raise ModelError(f"{name}: has no weight that its readers could take over; rotate inputs online")
    return rule, keeps_mean


def _reader(name: str, rule: Rule, pairs: Pairs, width: int) -> Reader:
    pair = next((p for p in pairs if p.producer == name), None)
    if pair is None:
        fed = f"fed by {name}, which "
        why = next((r.removeprefix(fed) for r in pairs.skipped.values() if r.startswith(fed)), "feeds no linear layer")
        raise ModelError(f"{name}: {why}, so its weight cannot move into its readers; rotate inputs online")
    for consumer in pair.consumers:
        if not np.array_equal(consumer.channels, np.arange(width)):
            raise ModelError(f"{consumer.module}: reads {name} in another order of channels; rotate inputs online")
    return Reader(name, rule, tuple(c.module for c in pair.consumers))


def _ends(model: nn.Module, structure: Structure) -> tuple[str, str, int]:
    """Embedding, head and width of the stream between them."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{kind}: encoder and decoder have a residual stream each; rotate inputs online")
    if len(structure.embeddings) != 1 or structure.head is None or not structure.blocks:
        raise ModelError(f"{kind}: has no output head that could take the rotation back; open it with its head")
    (embedding,) = structure.embeddings
    weight = model.get_submodule(embedding)._parameters.get("weight")
    head = model.get_submodule(structure.head)
    if weight is None or not is_linear(head) or columns_of(head) != weight.shape[1]:
        raise ModelError(f"{structure.head}: does not read what {embedding} writes; rotate inputs online")
    return embedding, structure.head, int(weight.shape[1])


def _outside(model: nn.Module, structure: Structure, ends: tuple[str, str], width: int) -> tuple[str, tuple[str, ...]]:
    """The one norm outside of the blocks, and embeddings as wide as the stream, which are added to the first one.

    All else there that holds parameters might read or write the stream.
    """
    outside = [
        name
        for name, module in model.named_modules()
        if structure.block_of(name) is None
        and name not in ends
        and (is_norm(module) or any(True for _ in module.parameters(recurse=False)))
    ]
    norms: list[str] = [name for name in outside if is_norm(model.get_submodule(name))]
    places = tuple(name for name in outside if _is_table(model.get_submodule(name), width))
    other = next((name for name in outside if name not in norms and name not in places), None)
    if other is not None:
        raise ModelError(f"{other}: is outside of the blocks and may touch the residual stream; rotate inputs online")
    if len(norms) != 1:
        found = ", ".join(norms) or "none"
        raise ModelError(f"{type(model).__name__}: needs one norm before its head, has {found}; rotate inputs online")
    return norms[0], places


def _is_table(module: nn.Module, width: int) -> bool:
    return isinstance(module, nn.Embedding) and module.embedding_dim == width
