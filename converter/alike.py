"""Layers that look alike: what is made of one is made of the others, at other addresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping

import torch

from fuseport.kernels.move import ALIGNED

from .layout import Layout, mapped
from .model import ModelSpec
from .plan import extent
from .sources.megatron_names import layer_name, layer_of


class Alike:
    """The layers that have the names, shapes, strides, dtypes and alignment of an earlier one.

    Args:
        tensors: a whole model's, by Megatron-Core's names.
        spec: its facts; layers that it tells apart are not alike.

    Attributes:
        first: layer → the first one that it is like.
        others: the tensors of the layers that are like no earlier one, and of what is no layer.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> None:
        layers: dict[int, dict[str, torch.Tensor]] = {}
        self.others: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            place = layer_of(name)
            if place is not None and place[0] < spec.num_layers:
                layers.setdefault(place[0], {})[place[1]] = tensor
            else:
                self.others[name] = tensor
        self.first: dict[int, int] = {}
        self._own: dict[int, dict[int, torch.Tensor]] = {}
        self._memory: dict[int, _Memory] = {}
        firsts: dict[Hashable, int] = {}
        for layer in sorted(layers):
            self._add(layer, layers, firsts, spec)

    def _add(
        self,
        layer: int,
        layers: Mapping[int, Mapping[str, torch.Tensor]],
        firsts: dict[Hashable, int],
        spec: ModelSpec,
    ) -> None:
        parts = layers[layer]
        looks = frozenset((name, looks_of(tensor)) for name, tensor in parts.items())
        first = firsts.setdefault((spec.block(layer), spec.is_moe(layer), looks), layer)
        if first not in self._memory:
            self._memory[first] = _Memory(parts.values())
        if first == layer or not self._memory[first].is_plain:
            self.others |= {layer_name(layer, name): tensor for name, tensor in parts.items()}
            return
        self.first[layer] = first
        self._own[layer] = {id(layers[first][name]): tensor for name, tensor in parts.items()}

    def whole(self, layer: int, view: torch.Tensor) -> torch.Tensor:
        """What a view in a layer, or in the one that it is like, is a view of; else the view."""
        memory = self._memory.get(self.first.get(layer, layer))
        return view if memory is None else memory.find(view)

    def own(self, layer: int, tensor: torch.Tensor) -> torch.Tensor:
        """What a layer has for a tensor of the first one that it is like; others stay."""
        return self._own[layer].get(id(tensor), tensor) if layer in self.first else tensor

    def moved(self, layer: int, layout: Layout) -> Layout:
        """A layout of the first layer, over a layer's own memory."""

        def own(view: torch.Tensor) -> torch.Tensor:
            whole = self.whole(layer, view)
            other = self.own(layer, whole)
            start = int(other.storage_offset() + view.storage_offset() - whole.storage_offset())
            return other.as_strided(view.shape, view.stride(), start)

        return mapped(layout, own) if layer in self.first else layout


class _Memory:
    """A layer's tensors by their addresses; `is_plain` if none is empty and none overlap."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = sorted(tensors, key=torch.Tensor.data_ptr)
        self._starts = [tensor.data_ptr() for tensor in self._tensors]
        self._ends = list(map(_end, self._tensors))
        apart = all(end <= start for end, start in zip(self._ends, self._starts[1:], strict=False))
        self.is_plain = apart and all(tensor.numel() for tensor in self._tensors)

    def find(self, view: torch.Tensor) -> torch.Tensor:
        """The tensor in which a view begins, or the view."""
        at = view.data_ptr()
        number = bisect_right(self._starts, at) - 1
        return self._tensors[number] if number >= 0 and at < self._ends[number] else view


def looks_of(tensor: torch.Tensor) -> Hashable:
    """All of a view but its address, which matters for its alignment alone."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNED


def _end(tensor: torch.Tensor) -> int:
    first, last = extent(tensor)
    return tensor.data_ptr() + (last - first) * tensor.element_size()
