"""One layer's way: from which rows and columns of the source to which ones of the target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..checkpoint_plan import CheckpointPlan
from ..plan import Planned
from .boxes import Box, boxes
from .roles import NORMS, Atlas

# What fits a picture: source tensors of one kind, and target tensors of one source tensor.
ALIKE, TARGETS = 1, 8


@dataclass(frozen=True)
class Matrix:
    """A tensor as a matrix: its name, rows, columns and dtype."""

    name: str
    rows: int
    columns: int
    dtype: str

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Matrix:
        """A tensor's rows are all its axes but the last."""
        columns = shape[-1] if shape else 1
        return cls(name, math.prod(shape[:-1]), columns, str(dtype).removeprefix("torch."))


@dataclass
class Arrival:
    """A target tensor of a file, and the boxes that come from one source tensor, by part."""

    file: str
    matrix: Matrix
    boxes: list[tuple[str, Box]] = field(default_factory=list)


@dataclass
class Departure:
    """A source tensor, and where its parts arrive."""

    matrix: Matrix
    arrivals: dict[int, Arrival] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The parts of the model that it holds."""
        found = (parts for one in self.arrivals.values() for parts, _ in one.boxes)
        return list(dict.fromkeys(found))

    @property
    def shown(self) -> list[Arrival]:
        """The arrivals that fit the picture: some of each mix of parts."""
        mixes: dict[tuple[str, ...], list[Arrival]] = {}
        for one in self.arrivals.values():
            mixes.setdefault(tuple(part for part, _ in one.boxes), []).append(one)
        share = max(1, TARGETS // len(mixes))
        return [one for mix in mixes.values() for one in mix[:share]][:TARGETS]


@dataclass(frozen=True)
class Journey:
    """A layer's source tensors; `alike` and `norms` are how many more there are than are shown."""

    layer: int
    layers: int
    departures: list[Departure]
    alike: int
    norms: int


def journey(plan: CheckpointPlan, atlas: Atlas) -> Journey:
    """The way of the layer in the middle of the model."""
    layers = len(atlas.model.layers)
    middle = layers // 2
    found: dict[str, Departure] = {}
    norms: set[str] = set()
    for planned in plan.tensors:
        _follow(plan, planned, atlas, middle, found, norms)
    shown: list[Departure] = []
    kinds: dict[tuple[str, ...], int] = {}
    for departure in found.values():
        kind = tuple(departure.parts)
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= ALIKE:
            shown.append(departure)
    return Journey(middle, layers, shown, len(found) - len(shown), len(norms))


def _follow(
    plan: CheckpointPlan, planned: Planned, atlas: Atlas, layer: int,
    found: dict[str, Departure], norms: set[str],
) -> None:  # fmt: skip
    """Note where a target tensor's moves come from."""
    for move in planned.moves:
        role, tensor = atlas.role(move.src), atlas.tensor(move.src)
        if role is None or tensor is None or role.layer != layer:
            continue
        view, name = tensor
        if role.kind == NORMS or view.ndim < 2:
            norms.add(name)
            continue
        source = Matrix.of(name, tuple(view.shape), atlas.dtype(view))
        departure = found.setdefault(name, Departure(source))
        target = Matrix.of(planned.name, tuple(planned.dst.shape), planned.dst.dtype)
        file = plan.images[planned.rank].name
        arrival = departure.arrivals.setdefault(id(planned), Arrival(file, target))
        first = int(view.storage_offset())
        for box in boxes(move, first, source.columns, target.columns):
            arrival.boxes.append((role.name, box))
