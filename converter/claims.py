"""Handing out a source's tensors by name, each once, with nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from fuseport.kernels.move import FLOATS

from .errors import (
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
    UnsupportedOptionError,
)

Spellings = tuple[str, ...]


class Claims:
    """Tensors by name; `take` and `need` hand them out, `finish` names what nobody wanted.

    `ignored` maps a piece of a name to the reason why such a tensor carries no weight.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __init__(self, tensors: Mapping[str, torch.Tensor], ignored: Mapping[str, str]) -> None:
        self._left = {
            name: tensor
            for name, tensor in tensors.items()
            if not any(piece in name for piece in ignored)
        }

    def take(self, spellings: Spellings, shape: tuple[int | None, ...]) -> torch.Tensor | None:
        """The tensor under one of `spellings`, or None. A None in `shape` fits any size.

        Raises:
            UnknownTensorError: it is there under two spellings.
            ShapeError: it has another shape.
            UnsupportedOptionError: its dtype is not one that is converted.
        """
        found = [name for name in spellings if name in self._left]
        if not found:
            return None
        if len(found) > 1:
            raise UnknownTensorError(
                f"the source has one tensor twice, as {' and '.join(found)}; keep one of them"
            )
        tensor = self._left.pop(found[0])
        if tensor.shape != shape:
            _check_shape(found[0], tuple(tensor.shape), shape)
        check_dtype(found[0], tensor.dtype, self.dtypes)
        return tensor

    def has(self, prefix: str) -> bool:
        """Whether a tensor is left whose name begins like this."""
        return any(name.startswith(prefix) for name in self._left)

    def need(self, spellings: Spellings, shape: tuple[int | None, ...]) -> torch.Tensor:
        """Like `take`, for a tensor that must be there.

        Raises:
            MissingTensorError: it is not.
        """
        tensor = self.take(spellings, shape)
        if tensor is None:
            size = " × ".join("any" if n is None else str(n) for n in shape)
            raise MissingTensorError(
                f"the source has no tensor {' or '.join(spellings)} [{size}], which the model's "
                f"facts call for; check the source, or correct the facts (--fact, --spec)"
            )
        return tensor

    def want(
        self, spellings: Spellings, shape: tuple[int | None, ...], expected: bool
    ) -> torch.Tensor | None:
        """A tensor that is there if and only if the facts say so: else `finish` names it."""
        return self.need(spellings, shape) if expected else None

    def finish(self) -> None:
        """Raise UnknownTensorError if a tensor was not handed out."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UnknownTensorError(
                f"the source has tensors that the model's facts do not call for: "
                f"{', '.join(names[:5])}{more}; check the number of layers and experts, biases and "
                f"norms in the facts (--fact, --spec), or remove the tensors"
            )


class LenientClaims(Claims):
    """For facts that leave biases and norms open: what is there is used."""

    def want(
        self, spellings: Spellings, shape: tuple[int | None, ...], expected: bool
    ) -> torch.Tensor | None:
        """Like `take` where the facts do not expect the tensor."""
        return self.need(spellings, shape) if expected else self.take(spellings, shape)


class PartialClaims(LenientClaims):
    """For a few tensors of a model: a meta tensor stands in for each missing one.

    Target tensors that are made of such are left out (`WeightsConverter.partial_targets`).
    """

    def need(self, spellings: Spellings, shape: tuple[int | None, ...]) -> torch.Tensor:
        """Like `take`, with a stand-in for a tensor that is not there."""
        tensor = self.take(spellings, shape)
        if tensor is None:
            tensor = torch.empty([size or 0 for size in shape], dtype=torch.float32, device="meta")
        return tensor


class StoredClaims(Claims):
    """For weights some of which are the codes of fp8 weights whose scales are known."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (*FLOATS, torch.float8_e4m3fn)


def check_dtype(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raise UnsupportedOptionError for a dtype that is not converted."""
    if dtype not in dtypes:
        known = ", ".join(str(one).removeprefix("torch.") for one in FLOATS)
        raise UnsupportedOptionError(
            f"{name} has dtype {dtype}, but weights are converted from {known} only; save the "
            f"checkpoint with one of these"
        )


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    fits = len(found) == len(expected) and all(
        want in (None, have) for have, want in zip(found, expected, strict=True)
    )
    if not fits:
        want = ["any" if size is None else size for size in expected]
        raise ShapeError(
            f"{name} has shape {list(found)}, but the model's facts call for {want}; "
            f"correct the facts (--fact, --spec)"
        )
