"""Parameters that stay in training, and how it is noticed that one has moved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter

import torch

from .errors import MissingTensorError, ShapeError

State = Mapping[str, torch.Tensor]
# Where no tensor is.
_NOWHERE = -1


class Live:
    """A process's parameters by their names in the whole model.

    Args:
        source: a state dict, kept: its entries may change.
        names: name in the whole model → name in `source`.
        constants: tensors that never move, beside them.
        first: names in the whole model that are looked at before the others.
    """

    def __init__(
        self,
        source: State,
        names: Mapping[str, str],
        constants: State,
        first: Collection[str] = (),
    ) -> None:
        self._source = source
        self.tensors = {name: source[own] for name, own in names.items()} | dict(constants)
        early = {name: own for name, own in names.items() if name in first}
        late = {name: own for name, own in names.items() if name not in first}
        self._parts = [_Part(part, source) for part in (early, late) if part]

    def looks(self, source: State | None = None) -> Iterator[set[str]]:
        """Look at the first ones, if there are any, then at the others.

        Yields the names of those whose address has changed since they were last looked at.

        Args:
            source: to be looked at from now on instead of the earlier state dict.

        Raises:
            MissingTensorError, ShapeError: one is gone, or is of another kind.
        """
        self._source = self._source if source is None else source
        for part in self._parts:
            moved, addresses = part.moved(self._source)
            for name, tensor in moved.items():
                _check_alike(name, tensor, self.tensors[name])
            self.tensors |= moved
            # Known only now: what was refused must be refused again.
            part.addresses = addresses
            yield set(moved)

    def forget(self) -> None:
        """Take all for moved at the next look, as it is not known who has followed them."""
        for part in self._parts:
            part.addresses = [_NOWHERE] * len(part.addresses)


class _Part:
    """Some of the parameters, and where they were when they were last looked at."""

    def __init__(self, names: Mapping[str, str], source: State) -> None:
        self._names = tuple(names)
        # Twice the first: of one key an itemgetter makes no tuple.
        keys = list(names.values())
        self._get = itemgetter(keys[0], *keys)
        self.addresses = self._look(source)[1]

    def _look(self, source: State) -> tuple[tuple[torch.Tensor, ...], list[int]]:
        # This is done at every step, with the GPU idle: nothing here but two calls into C.
        found = self._get(source)
        return found, [*map(torch.Tensor.data_ptr, found)]

    def moved(self, source: State) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Those at another address than the known one, and the addresses of all."""
        try:
            found, addresses = self._look(source)
        except KeyError as error:
            raise MissingTensorError(
                f"the state dict no longer has {error}; make a new Refit for another model"
            ) from error
        except TypeError as error:
            raise MissingTensorError(
                f"the state dict holds what is no torch.Tensor where one was planned ({error})"
            ) from error
        if addresses == self.addresses:
            return {}, addresses
        rows = zip(self._names, found[1:], addresses[1:], self.addresses[1:], strict=True)
        return {name: tensor for name, tensor, new, old in rows if new != old}, addresses


def _check_alike(name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    kinds = [(t.dtype, tuple(t.shape), t.stride(), t.device) for t in (new, old)]
    if kinds[0] != kinds[1]:
        raise ShapeError(f"{name} is now {kinds[0]}, planned were {kinds[1]}; make a new Refit")
    if new.numel() and not new.data_ptr():
        raise MissingTensorError(f"{name} has no memory now; bring it back before a refit")
