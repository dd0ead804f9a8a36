"""Which part of the model a view of a source's memory is: read off the logical views.

A target tensor's moves begin in logical views, and those say by their place in the model what they
are. So nothing is read out of a name, of a source or of a target.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..checkpoint_plan import CheckpointPlan
from ..logical import Layer, Model, Norm
from ..plan import extent, storage_key
from ..sources.dequantised import Dequantised

Label = TypeVar("Label")

# Parts of a model by what they are counted as; the innermost one decides.
KINDS = {
    "embedding": "embedding",
    "positions": "embedding",
    "output": "output",
    "attention": "attention",
    "mlp": "MLP",
    "experts": "experts",
    "shared": "shared experts",
    "shared_gate": "shared experts",
    "router": "router",
    "router_bias": "router",
    "router_linear_bias": "router",
}
NORMS, OTHER = "norms", "other"


@dataclass(frozen=True)
class Role:
    """A part of the model: its layer (-1 outside of the layers), its kind, and its path there."""

    layer: int
    path: tuple[str, ...]
    kind: str

    @property
    def name(self) -> str:
        """ "attention q" or "experts down"."""
        return " ".join((self.kind, *self.path)).replace("_", " ")


def roles(model: Model) -> Iterator[tuple[torch.Tensor, Role]]:
    """Every logical view of a model, and what it is."""
    yield from _within(model, Role(-1, (), OTHER))


def _within(value: object, role: Role) -> Iterator[tuple[torch.Tensor, Role]]:
    if isinstance(value, torch.Tensor):
        yield value, role
    elif isinstance(value, tuple):
        for index, one in enumerate(value):
            inner = dataclasses.replace(role, layer=index) if isinstance(one, Layer) else role
            yield from _within(one, inner)
    elif dataclasses.is_dataclass(value):
        kind = NORMS if isinstance(value, Norm) else role.kind
        for field in dataclasses.fields(value):
            inner = _step(dataclasses.replace(role, kind=kind), field.name)
            yield from _within(getattr(value, field.name), inner)


# Words of a path that say nothing beside the kind.
_SILENT = {"layers", "weight", *KINDS} - {"positions", "shared_gate", "router_bias"}


def _step(role: Role, name: str) -> Role:
    kind = role.kind if role.kind == NORMS else KINDS.get(name, role.kind)
    path = role.path if name in _SILENT else (*role.path, name)
    return dataclasses.replace(role, kind=kind, path=path)


class Views(Generic[Label]):
    """Labelled views, to be found by any view that begins in one of them."""

    def __init__(self, labelled: Iterable[tuple[torch.Tensor, Label]]) -> None:
        self._found: dict[int, list[tuple[int, torch.Tensor, Label]]] = {}
        for view, label in labelled:
            if view.numel():
                first, _ = extent(view)
                self._found.setdefault(storage_key(view), []).append((first, view, label))
        for views in self._found.values():
            views.sort(key=lambda one: one[0])

    def at(self, storage: int, element: int) -> tuple[torch.Tensor, Label] | None:
        """The view that holds an element of a storage, and its label."""
        views = self._found.get(storage, [])
        after = bisect.bisect_right(views, element, key=lambda one: one[0])
        # Views may interleave, as query, key and value heads do: the nearest ones come first.
        for first, view, label in reversed(views[:after]):
            if _holds(view, element - first):
                return view, label
        return None


def _holds(view: torch.Tensor, distance: int) -> bool:
    """True if a view has an element so far behind its first one."""
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True), reverse=True):
        if stride and size > 1:
            index = distance // stride
            if index >= size:
                return False
            distance -= index * stride
    return distance == 0


class Atlas:
    """Finds, for views that a plan's moves read, the part of the model and the source's tensor."""

    def __init__(self, plan: CheckpointPlan) -> None:
        model = plan.source.read(plan.source.tensors, plan.spec)
        self.model, self._stored = model, plan.source.stored
        self._roles = Views(roles(model))
        self._tensors = Views((tensor, name) for name, tensor in plan.source.tensors.items())
        self._values = _values_of(plan)

    def role(self, view: torch.Tensor) -> Role | None:
        """The part of the model that a view begins in; None for zeros and scales."""
        found = self._roles.at(*self._place(view))
        return None if found is None else found[1]

    def tensor(self, view: torch.Tensor) -> tuple[torch.Tensor, str] | None:
        """The source's tensor, of one layer, that a view begins in, and its name."""
        return self._tensors.at(*self._place(view))

    def dtype(self, view: torch.Tensor) -> torch.dtype:
        """What a tensor's elements are stored as: a quantised weight's are its codes."""
        stored = self._stored.get(storage_key(view))
        return stored.codes.dtype if isinstance(stored, Dequantised) else view.dtype

    def _place(self, view: torch.Tensor) -> tuple[int, int]:
        """A storage and an element of it; kept codes stand for those values."""
        key = storage_key(view)
        return self._values.get(key, key), int(view.storage_offset())


def _values_of(plan: CheckpointPlan) -> Mapping[int, int]:
    """Storage of kept codes → storage of the values that they stand for."""
    stored = plan.source.stored.items()
    codes = {id(one.codes): key for key, one in stored if isinstance(one, Dequantised)}
    return {key: codes[id(one)] for key, one in plan.stored.items() if id(one) in codes}
