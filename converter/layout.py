"""How views make up one target tensor: a small tree of concatenations and stacks.

A rule says `cat(q, k, v)`; nothing is copied until `pairs` turns the tree into (dst, src) views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flat:
    """A view whose axes are read off in order as a tensor of `shape`: no copy, as `view` would."""

    view: torch.Tensor
    shape: Shape


@dataclass(frozen=True)
class Cat:
    """Parts one after the other along dimension 0."""

    parts: tuple[Layout, ...]


@dataclass(frozen=True)
class Stack:
    """Parts of one shape along a new leading dimension."""

    parts: tuple[Layout, ...]


@dataclass(frozen=True)
class Alternate:
    """Views of one shape [..., n] whose last elements take turns: [..., n · parts]."""

    parts: tuple[torch.Tensor, ...]


Layout = torch.Tensor | Flat | Cat | Stack | Alternate


def cat(*parts: Layout | None) -> Layout:
    """Concatenate along dimension 0; absent parts are left out, and empty ones beside others."""
    present = [part for part in parts if part is not None]
    filled = [part for part in present if shape_of(part)[0] > 0] or present[:1]
    return filled[0] if len(filled) == 1 else Cat(tuple(filled))


def flat_rows(view: torch.Tensor, axes: int) -> Flat:
    """The first `axes` axes as one: [G, Q, D, H] → [G·Q·D, H]."""
    return Flat(view, (math.prod(view.shape[:axes]), *view.shape[axes:]))


def flat_columns(view: torch.Tensor) -> Flat:
    """All axes but the first as one: [H, G, Q, D] → [H, G·Q·D]."""
    return Flat(view, (view.shape[0], math.prod(view.shape[1:])))


def shape_of(layout: Layout) -> Shape:
    """The shape of the tensor that a layout makes up."""
    if isinstance(layout, (torch.Tensor, Flat)):
        return tuple(layout.shape)
    if isinstance(layout, Alternate):
        *outer, last = layout.parts[0].shape
        return (*outer, last * len(layout.parts))
    first = shape_of(layout.parts[0])
    if isinstance(layout, Stack):
        return (len(layout.parts), *first)
    return (sum(shape_of(part)[0] for part in layout.parts), *first[1:])


def leaves(layout: Layout) -> Iterator[torch.Tensor]:
    """The views that a layout is made of."""
    if isinstance(layout, torch.Tensor):
        yield layout
    elif isinstance(layout, Flat):
        yield layout.view
    else:
        for part in layout.parts:
            yield from leaves(part)


def mapped(layout: Layout, change: Callable[[torch.Tensor], torch.Tensor]) -> Layout:
    """The same layout of other views."""
    if isinstance(layout, torch.Tensor):
        return change(layout)
    if isinstance(layout, Flat):
        return Flat(change(layout.view), layout.shape)
    if isinstance(layout, Alternate):
        return Alternate(tuple(map(change, layout.parts)))
    return type(layout)(tuple(mapped(part, change) for part in layout.parts))


def pairs(dst: torch.Tensor, layout: Layout) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(dst view, src view) of one shape for every leaf of the layout. `dst` is contiguous."""
    if isinstance(layout, torch.Tensor):
        yield dst, layout
    elif isinstance(layout, Flat):
        yield dst.view(layout.view.shape), layout.view
    elif isinstance(layout, Alternate):
        turns = dst.unflatten(-1, (-1, len(layout.parts)))
        yield from zip(turns.unbind(-1), layout.parts, strict=True)
    elif isinstance(layout, Stack):
        for index, part in enumerate(layout.parts):
            yield from pairs(dst.select(0, index), part)
    else:
        start = 0
        for part in layout.parts:
            length = shape_of(part)[0]
            yield from pairs(dst.narrow(0, start, length), part)
            start += length
