# SPDX-License-Identifier: Apache-2.0
"""`RoutedRows`: inside a mixture of experts, which tokens the rows of a tensor are, and what each expert multiplies.

Every torch function called inside the scope passes here unchanged. Those that choose, repeat, split or reshape rows
choose, repeat, split or reshape the token numbers too; a product with a fused weight is reported per expert. Nothing
is assumed about the order in which an implementation sorts its tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from calib.sites.experts import ExpertBank, slices_of

__all__ = ["Routed", "RoutedRows"]

Tensor = torch.Tensor
_PRODUCTS = frozenset({
    "linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback",
})  # fmt: skip
_ADDS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
_MOVES = frozenset({"t", "transpose", "permute", "movedim", "swapaxes", "__get__", "sort", "argsort", "flip", "roll"})
_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split"})


@dataclass(frozen=True, eq=False)
class Routed:
    """What one expert reads or makes.

    Attributes:
        bank: the weight it is about.
        port: of the bank: `bank.reads` or `bank.makes`.
        expert: which one.
        values: ``[rows, channels]``.
        rows: int64 ``[rows]``, number of the token in the input of the scope; None if that got lost.
    """

    bank: ExpertBank
    port: str
    expert: int
    values: Tensor
    rows: Tensor | None


@dataclass(eq=False)
class _Product:
    """A product whose bias may still be added."""

    bank: ExpertBank
    value: Tensor
    parts: Callable[[Tensor], list[tuple[int, Tensor]]]
    rows: list[Tensor | None]


class RoutedRows(TorchFunctionMode):
    """Follows the rows of one scope at a time.

    Args:
        banks: the fused weights of the model.
        report: called for each tensor of each expert that gets tokens.
    """

    def __init__(self, banks: list[ExpertBank], report: Callable[[Routed], None]) -> None:
        super().__init__()
        self._report = report
        self._banks: dict[int, list[tuple[torch.nn.Parameter, ExpertBank, bool]]] = {}
        for bank in banks:
            for parameter in (bank.weight, *bank.biases):
                held = self._banks.setdefault(parameter.untyped_storage().data_ptr(), [])
                held.append((parameter, bank, parameter is bank.weight))
        self._rows: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._gathered: dict[int, tuple[weakref.ref[Tensor], ExpertBank, bool, Tensor]] = {}
        self._pending: _Product | None = None
        self.active = False

    def begin(self, tensor: Tensor) -> None:
        """Enters a scope whose input is ``[..., channels]``; its tokens are numbered through."""
        self.__enter__()
        self.active = True
        lead = tensor.shape[:-1]
        self._keep_rows(tensor, torch.arange(lead.numel(), device=tensor.device).reshape(lead))

    def end(self) -> None:
        """Leaves the scope."""
        if not self.active:
            return
        self.active = False
        self.__exit__(None, None, None)
        self._flush()
        self._rows.clear()
        self._gathered.clear()

    def rows_of(self, tensor: Tensor) -> Tensor | None:
        """Token number of each row of a tensor ``[..., channels]``, int64 and flat; None if unknown."""
        rows = self._known(tensor)
        if rows is None:
            return None
        return _over_lead(rows, tensor).reshape(-1)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Calls what was called, then looks at what it did."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._pending is not None and name not in _ADDS | _RESHAPES and _takes(args, self._pending.value):
            self._flush()
        result = func(*args, **kwargs)
        if name in _PRODUCTS:
            self._see_product(args, kwargs, result)
        elif self._pending is not None and isinstance(result, Tensor) and _takes(args, self._pending.value):
            if (name in _RESHAPES and result.numel() == self._pending.value.numel()) or (
                name in _ADDS and any(self._weight(a) for a in args if isinstance(a, Tensor))
            ):
                self._pending.value = result
            else:
                self._flush()
        if name in ("__getitem__", "index_select"):
            self._see_gather(args, kwargs, name, result)
        self._follow(name, args, kwargs, result)
        return result

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Gives the result the rows of the first argument that has some."""
        if name in _MOVES:
            return
        if name in ("cat", "concat", "concatenate"):
            parts = [self._known(t) for t in args[0] if isinstance(t, Tensor)]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 0 and parts and all(p is not None and p.ndim == 1 for p in parts):
                self._keep_rows(result, torch.cat([p for p in parts if p is not None]))
                return
            args = tuple(args[0])
        source = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and id(t) in self._rows), None)
        rows = None if source is None else self._known(source)
        if source is None or rows is None:
            return
        if isinstance(result, Tensor):
            found = _rows_after(name, rows, source, args, kwargs, result)
            if found is not None:
                self._keep_rows(result, found)
        elif isinstance(result, tuple | list) and all(isinstance(t, Tensor) for t in result):
            self._keep_parts(name, rows, source, result)

    def _keep_parts(self, name: str, rows: Tensor, source: Tensor, parts: Any) -> None:
        lengths = [part.shape[0] if part.ndim else 0 for part in parts]
        if name in _SPLITS and sum(lengths) == rows.shape[0] and parts[0].shape[1:] == source.shape[1:]:
            for part, own in zip(parts, rows.split(lengths), strict=True):
                self._keep_rows(part, own)
            return
        for part in parts:
            if part.shape[: rows.ndim] == rows.shape and part.ndim > rows.ndim:
                self._keep_rows(part, rows)

    def _see_gather(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, result: Any) -> None:
        """Weights or biases gathered per row: ``weight[expert_ids]``."""
        if not isinstance(result, Tensor) or not isinstance(args[0], Tensor):
            return
        index = args[2] if name == "index_select" and len(args) > 2 else args[-1]
        found = self._weight(args[0])
        if found is not None and isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
            bank, is_weight, _ = found
            self._gathered[id(result)] = weakref.ref(result), bank, is_weight, index

    def _weight(self, tensor: Tensor) -> tuple[ExpertBank, bool, Tensor | None] | None:
        """The bank whose weight or bias a tensor is, or is gathered from, by which experts; None if it is neither."""
        held = self._gathered.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1], held[2], held[3]
        try:
            key = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # tensors without memory of their own
            return None
        for parameter, bank, is_weight in self._banks.get(key, ()):
            start = parameter.storage_offset()
            if start <= tensor.storage_offset() < start + parameter.numel():
                return bank, is_weight, None
        return None

    def _see_product(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        for position, weight in enumerate(tensors[:2]):
            found = self._weight(weight)
            if found is not None and found[1] and len(tensors) > 1 and isinstance(result, Tensor):
                other = tensors[1 - position]
                offsets = kwargs.get(
                    "offs", tensors[2] if len(tensors) > 2 and not tensors[2].is_floating_point() else None
                )
                self._take_product(found[0], weight, found[2], other, offsets, result)
                return

    def _take_product(
        self, bank: ExpertBank, weight: Tensor, ids: Tensor | None, read: Tensor, offsets: Tensor | None, made: Tensor
    ) -> None:
        part = slices_of(bank, weight) if ids is None else -1
        if part is None:
            return
        if ids is not None:
            cut = _by_ids(ids)
        elif part >= 0:
            cut = _whole(part)
        elif offsets is not None:
            cut = _by_offsets(offsets)
        else:
            cut = _by_expert(bank.experts)
        rows = self.rows_of(read) if ids is None else self._known(read)
        if rows is not None and rows.numel() != read.numel() // max(1, _width(read, ids)):
            rows = None
        flat = read.reshape(ids.numel(), -1) if ids is not None else read
        pieces = cut(flat)
        if ids is None and part < 0 and offsets is None:  # all tokens pass all experts, those not routed as zeros
            row_parts: list[Tensor | None] = [None] * len(pieces)
            if rows is not None:
                row_parts = [own for _, own in cut(rows.reshape(*read.shape[:-1]))]
            self._dense(bank, pieces, row_parts, made)
            return
        row_parts = [None] * len(pieces) if rows is None else [own for _, own in cut(rows.reshape(-1))]
        self._send(bank, bank.reads, pieces, row_parts)
        self._pending = _Product(
            bank, made, (lambda t: cut(t.reshape(ids.numel(), -1))) if ids is not None else cut, row_parts
        )

    def _dense(
        self, bank: ExpertBank, pieces: list[tuple[int, Tensor]], rows: list[Tensor | None], made: Tensor
    ) -> None:
        for (expert, values), own, result in zip(pieces, rows, made, strict=True):
            sent = (values != 0).any(-1)
            kept = None if own is None else own[sent]
            self._send(bank, bank.reads, [(expert, values[sent])], [kept])
            self._send(bank, bank.makes, [(expert, result[sent])], [kept])

    def _flush(self) -> None:
        """Reports the last product, now that its bias is added."""
        held, self._pending = self._pending, None
        if held is not None:
            self._send(held.bank, held.bank.makes, held.parts(held.value), held.rows)

    def _send(
        self, bank: ExpertBank, port: str | None, pieces: list[tuple[int, Tensor]], rows: list[Tensor | None]
    ) -> None:
        if port is None:
            return
        for (expert, values), own in zip(pieces, rows, strict=True):
            if values.numel():
                flat = values.reshape(-1, values.shape[-1])
                self._report(Routed(bank, port, expert, flat, None if own is None else own.reshape(-1)))

    def _known(self, tensor: Tensor) -> Tensor | None:
        held = self._rows.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def _keep_rows(self, tensor: Tensor, rows: Tensor) -> None:
        self._rows[id(tensor)] = weakref.ref(tensor), rows


Cut = Callable[[Tensor], list[tuple[int, Tensor]]]


def _whole(expert: int) -> Cut:
    return lambda tensor: [(expert, tensor)]


def _by_expert(experts: int) -> Cut:
    return lambda tensor: [(expert, tensor[expert]) for expert in range(experts)]


def _by_offsets(offsets: Tensor) -> Cut:
    bounds = [0, *offsets.tolist()]
    used = [(expert, start, stop) for expert, (start, stop) in enumerate(pairwise(bounds)) if stop > start]
    return lambda tensor: [(expert, tensor[start:stop]) for expert, start, stop in used]


def _by_ids(ids: Tensor) -> Cut:
    order = torch.argsort(ids, stable=True)
    experts, counts = torch.unique(ids, return_counts=True)
    sizes = counts.tolist()
    return lambda tensor: list(zip(experts.tolist(), tensor[order].split(sizes), strict=True))


def _width(tensor: Tensor, ids: Tensor | None) -> int:
    return tensor.shape[-1] if ids is None else tensor.numel() // max(1, ids.numel())


def _takes(args: tuple[Any, ...], tensor: Tensor) -> bool:
    return any(a is tensor or (isinstance(a, tuple | list) and any(b is tensor for b in a)) for a in args)


def _over_lead(rows: Tensor, tensor: Tensor) -> Tensor:
    """Rows for all axes of a tensor but the last."""
    lead = tensor.shape[:-1]
    return rows.reshape(rows.shape + (1,) * (len(lead) - rows.ndim)).expand(lead) if len(lead) > rows.ndim else rows


def _rows_after(
    name: str, rows: Tensor, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> Tensor | None:
    """Token numbers of the rows of a result."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return rows if index[0] is Ellipsis and result.shape[: rows.ndim] == rows.shape else _rows_at(rows, index)
    if name == "index_select":
        dim, index = (*args[1:], *kwargs.values())[:2]
        return rows[index] if dim == 0 else rows
    if name == "repeat_interleave":
        times, dim = kwargs.get("repeats", args[1] if len(args) > 1 else 1), kwargs.get("dim", 0)
        return rows.repeat_interleave(times, dim=0) if dim == 0 else None
    if name == "repeat":
        times = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
        return rows.repeat(times[0]) if rows.ndim == 1 and len(times) == 2 and times[1] == 1 else None
    if name in _RESHAPES and result.ndim > 1 and source.ndim > 1 and result.shape[-1] == source.shape[-1]:
        full = _over_lead(rows, source)
        if full.ndim == source.ndim - 1 and full.numel() == result.shape[:-1].numel():
            return full.reshape(result.shape[:-1])
    return rows if result.shape[: rows.ndim] == rows.shape and result.ndim > rows.ndim else None


def _rows_at(rows: Tensor, parts: tuple[Any, ...]) -> Tensor | None:
    """Rows under an index of the tensor whose first axes they belong to."""
    if any(part is Ellipsis for part in parts):
        return None
    own: list[Any] = []
    axes = rows.ndim
    for part in parts:
        if axes == 0:
            break
        own.append(part)
        if part is not None:
            axes -= part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1
    try:
        return rows[tuple(own)]
    except IndexError:
        return None
