"""The numbers of a report: bytes by kind, errors by layer, losses, times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint_plan import CheckpointPlan
from ..losses import place
from ..plan import Planned, storage_key
from .roles import OTHER, Atlas, Role, roles


@dataclass(frozen=True)
class Sizes:
    """Bytes of one kind of parts, in the source and in the target."""

    source: int
    target: int


def sizes(plan: CheckpointPlan, atlas: Atlas) -> dict[str, Sizes]:
    """Bytes by kind, largest target first."""
    source: dict[str, int] = {}
    for view, role in roles(atlas.model):
        stored = plan.source.stored.get(storage_key(view))
        if stored is not None and stored.numel:
            nbytes = stored.nbytes * view.numel() // stored.numel
            source[role.kind] = source.get(role.kind, 0) + nbytes
    target: dict[str, int] = {}
    for planned, kind in zip(plan.tensors, kinds(plan.tensors, atlas), strict=True):
        target[kind] = target.get(kind, 0) + planned.nbytes
    order = sorted({**target, **source}, key=lambda kind: -target.get(kind, 0))
    return {kind: Sizes(source.get(kind, 0), target.get(kind, 0)) for kind in order}


def kinds(tensors: list[Planned], atlas: Atlas) -> list[str]:
    """Each target tensor's kind; scales are of the kind of the weight in their group."""
    own = [next((role.kind for role in _roles(one, atlas)), "") for one in tensors]
    groups = {one.group: kind for one, kind in zip(tensors, own, strict=True) if kind}
    return [kind or groups.get(one.group, OTHER) for one, kind in zip(tensors, own, strict=True)]


def _roles(planned: Planned, atlas: Atlas) -> list[Role]:
    return [role for move in planned.moves if (role := atlas.role(move.src)) is not None]


@dataclass(frozen=True)
class Grid:
    """A number for each layer (row) and part (column) that has one."""

    rows: list[int]
    columns: list[str]
    values: dict[tuple[int, str], float]


def error_grid(plan: CheckpointPlan, atlas: Atlas, errors: Mapping[str, float]) -> Grid:
    """The largest relative error of a layer's parts, over ranks and experts."""
    values: dict[tuple[int, str], float] = {}
    for planned in plan.tensors:
        found = _roles(planned, atlas)
        error = errors.get(place(plan.images[planned.rank].name, planned.name))
        if found and error is not None:
            cell = found[0].layer, label(found)
            values[cell] = max(error, values.get(cell, 0.0))
    columns = list(dict.fromkeys(column for _, column in values))
    return Grid(sorted({row for row, _ in values}), columns, values)


def label(parts: list[Role]) -> str:
    """What is filled together: "attention q+k+v"."""
    lasts = list(dict.fromkeys(role.path[-1] for role in parts if role.path))
    first = parts[0]
    return " ".join([first.kind, *first.path[:-1], "+".join(lasts)]).strip().replace("_", " ")
