"""Parameters that stay in training, and how it is noticed that one has moved."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .errors import MissingTensorError, ShapeError


class Live:
    """A process's parameters by their names in the whole model.

    Args:
        source: a state dict, kept: its entries may change.
        names: name in the whole model → name in `source`.
        constants: tensors that never move, beside them.
    """

    def __init__(
        self,
        source: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        constants: Mapping[str, torch.Tensor],
    ) -> None:
        self._source, self._names = source, dict(names)
        self.tensors = {name: source[own] for name, own in names.items()} | dict(constants)
        self._addresses = [source[own].data_ptr() for own in names.values()]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.tensors.values())).device

    def moved(self, source: Mapping[str, torch.Tensor] | None = None) -> set[str]:
        """The names of those whose address has changed since the last call.

        Args:
            source: to be looked at from now on instead of the earlier state dict.

        Raises:
            MissingTensorError, ShapeError: one is gone, or is of another kind.
        """
        self._source = self._source if source is None else source
        try:
            found = [*map(self._source.__getitem__, self._names.values())]
        except KeyError as error:
            raise MissingTensorError(
                f"the state dict no longer has {error}; make a new Refit for another model"
            ) from error
        addresses = [*map(torch.Tensor.data_ptr, found)]
        if addresses == self._addresses:
            return set()
        triples = zip(self._names, found, zip(addresses, self._addresses, strict=True), strict=True)
        moved = {name: tensor for name, tensor, (new, old) in triples if new != old}
        for name, tensor in moved.items():
            _check_alike(name, tensor, self.tensors[name])
        self.tensors |= moved
        self._addresses = addresses
        return set(moved)


def _check_alike(name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    kinds = [(t.dtype, tuple(t.shape), t.stride(), t.device) for t in (new, old)]
    if kinds[0] != kinds[1]:
        raise ShapeError(f"{name} is now {kinds[0]}, planned were {kinds[1]}; make a new Refit")
