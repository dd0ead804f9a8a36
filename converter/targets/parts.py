"""What every target's rules answer with: parts of a layer, and where a shard's slices are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fuseport.kernels.move import GivenScale

from ..layout import Layout


@dataclass(frozen=True)
class CacheScale:
    """A dequant_scale of a KV cache: its tensor, and the kinds ("k", "v") that it stands for."""

    name: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]

    def within(self, prefix: str) -> CacheScale:
        """The same with something before its name."""
        return CacheScale(prefix + self.name, self.shape, self.kinds)


class TargetTensor(NamedTuple):
    """One tensor of one rank's file: what it is made of, and what happens to its values.

    `group` is the part's and `module` the name of its linear, both with layers numbered in the
    whole model and "" where the weight is never quantised. A tensor of several experts begins
    with number `first_expert`. `layer` counts in the whole model and is -1 outside of the layers.
    `cache` is the scale of the keys or values that the weight makes.
    """

    rank: int
    name: str
    layout: Layout
    dtype: torch.dtype
    shift: float = 0.0
    quant: GivenScale | None = None
    replicated: bool = False
    group: str = ""
    module: str = ""
    first_expert: int = 0
    layer: int = -1
    cache: CacheScale | None = None


class Part(NamedTuple):
    """A rule's answer: a tensor's name, in its layer if it is of one, and what it is made of.

    `replicated` ones are alike on all ranks. `group` names what engines fuse the weight into, and
    thus which weights must share a scale; without one the weight is never quantised.
    """

    name: str
    layout: Layout
    shift: float = 0.0
    dtype: torch.dtype | None = None
    replicated: bool = False
    group: str = ""
    first_expert: int = 0
    cache: CacheScale | None = None


@dataclass(frozen=True)
class Unit:
    """Something whole of a stage: its parts for a shard, and what goes before their names.

    `whole_prefix` numbers a layer in the whole model, as `layer` does, `prefix` in its stage.
    """

    parts: Callable[[Shard], Iterable[Part]]
    prefix: str = ""
    whole_prefix: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Shard:
    """A tensor-parallel rank's place: index `rank` of `size`."""

    rank: int
    size: int

    def along(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """This shard's equal share of an axis."""
        if self.size == 1:
            return tensor
        length = tensor.shape[axis] // self.size
        return tensor.narrow(axis, self.rank * length, length)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Column-parallel: this shard's output rows."""
        return self.along(tensor, 0)

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Row-parallel: this shard's input columns."""
        return self.along(tensor, 1)

    def query_heads(self, q: torch.Tensor) -> torch.Tensor:
        """[G, Q, …] → this shard's query heads: whole groups, or a part of one group."""
        groups = q.shape[0]
        if self.size <= groups:
            return self.rows(q)
        repeats = self.size // groups
        return Shard(self.rank % repeats, repeats).along(self._group(q), 1)

    def kv_heads(self, k: torch.Tensor) -> torch.Tensor:
        """[G, …] → this shard's KV heads; ranks that share a query group get the same one."""
        return self.rows(k) if self.size <= k.shape[0] else self._group(k)

    def _group(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, self.rank * tensor.shape[0] // self.size, 1)
