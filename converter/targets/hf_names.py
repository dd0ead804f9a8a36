"""The pieces of a layer, and the names that a family's table gives them there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import UnsupportedOptionError
from ..hf_family import Family, in_layer
from ..layout import Layout
from ..logical import Norm
from ..recipe import Recipe, matches
from .parts import CacheScale, TargetTensor

# Linears that are never quantised: engines take them for quantised where they are not listed.
# Patterns can name them. `experts.…` are weights of all experts in one tensor.
NEVER_QUANTISED = ("experts.gate_up", "experts.down", "router", "shared_gate", "further.join")


class Piece(NamedTuple):
    """A part of a layer, by the family's word for it, before its layer gives it a name."""

    part: str
    layout: Layout
    kind: str = "weight"
    expert: int = 0
    shift: float = 0.0
    dtype: torch.dtype | None = None


class Names:
    """The pieces of one layer, and the target tensors that they become.

    Layers that are alike have the same ones, `numbered`: `layer` is the first of them.
    """

    def __init__(self, family: Family, recipe: Recipe, layer: int) -> None:
        self.family, self.layer = family, layer
        self.dtype, self.recipe = recipe.torch_dtype, recipe

    def place(self, piece: Piece) -> TargetTensor:
        """A piece by its name, in which the layer has no number yet.

        Raises:
            UnsupportedOptionError: the family has no name for it.
        """
        part, kind = piece.part, piece.kind
        name = self._name(piece)
        module = name.rpartition(".")[0]
        group = ""
        if kind == "weight" and part in self.family.modules:
            group = self.family.group(part, module)
        if not group and (kind != "weight" or part not in NEVER_QUANTISED):
            module = ""
        return TargetTensor(
            0, name, piece.layout, piece.dtype or self.dtype, piece.shift, group=group,
            module=module, cache=_cache(part, module) if module else None,
        )  # fmt: skip

    def _name(self, piece: Piece) -> str:
        names = self.family.names(piece.part, piece.kind, None, piece.expert)
        if not names:
            raise UnsupportedOptionError(
                f"layer {self.layer} has a part {piece.part!r}, for which the family "
                f"{self.family.model_type} has no name; choose another as the fact model_type "
                f"(--fact model_type=NAME), or give a table as family (--family FILE)"
            )
        return names[0]

    def linear(
        self, part: str, weight: Layout, bias: Layout | None, expert: int = 0
    ) -> Iterator[Piece]:
        """A weight, and its bias if it has one."""
        yield Piece(part, weight, expert=expert)
        if bias is not None:
            yield Piece(part, bias, "bias", expert)

    def norm(self, part: str, norm: Norm | None) -> Iterator[Piece]:
        """Weights as the family stores them: with or without their 1."""
        if norm is not None:
            shift = norm.shift - self.family.norm_shift
            yield Piece(part, norm.weight, shift=shift)
            if norm.bias is not None:
                yield Piece(part, norm.bias, "bias")

    def check_left_out(self, part: str) -> None:
        """Raise UnsupportedOptionError if a tensor of experts is not left as it is."""
        name = self.family.names(part, layer=self.layer)[0]
        module = name.rpartition(".")[0]
        if self.recipe.quant != "none" and not matches(module, self.recipe.exclude):
            raise UnsupportedOptionError(
                f"{name}: no loader reads experts that lie in one tensor quantised as "
                f"{self.recipe.quant!r}; keep them as they are with '*.experts' in exclude "
                f"(--exclude '*.experts'; the other linears are quantised then), or leave out "
                f"quant (--quant)"
            )

    def module(self, part: str) -> bool:
        """True if the family has such a linear."""
        return bool(self.family.module(part))


def numbered(one: TargetTensor, layer: int) -> TargetTensor:
    """What a placed piece is in a layer."""
    cache = one.cache
    if cache is not None:
        cache = CacheScale(in_layer(cache.name, layer), cache.shape, cache.kinds)
    return one._replace(
        name=in_layer(one.name, layer), group=in_layer(one.group, layer),
        module=in_layer(one.module, layer), layer=layer, cache=cache,
    )  # fmt: skip


def _cache(part: str, module: str) -> CacheScale | None:
    """As ModelOpt names the scales of a KV cache: beside the weight that makes keys or values."""
    return CacheScale(f"{module}.{part}_scale", (), (part,)) if part in ("k", "v") else None
