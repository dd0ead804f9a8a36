"""How a target stores quantised weights: which tensors, of what shape, filled by which scheme.

`FORMATS` is the table: target and `Recipe.quant` → the scheme and the names of its scales.
Sources: the consumers' loaders. TensorRT-LLM's unified checkpoint (`weights_scaling_factor` and
`activation_scaling_factor`, `per_channel_scale`); ModelOpt's FP8 and MXFP8 (`weight_scale`,
`input_scale`) and NVFP4 (`weight_scale` of the blocks, `weight_scale_2`); compressed-tensors
(`weight_scale` [out, 1]); the fp8 block format (`weight_scale_inv`, a dequant_scale despite its
name).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fuseport.kernels.quant import BlockScale, MxScale, NvScale, RowScale, Scheme, TensorScale

from .errors import RecipeError
from .recipe import Recipe
from .targets.profiles import INPUT_SCALE, USUAL, ScaleTensor, of_rows, scalar, vector, written


@dataclass(frozen=True)
class Place:
    """A matrix's own scales (and second scale), its group's amax, its columns, a move's first row.

    `second` is a tensor that nothing reads where the scheme has no second scale; `amax` is made
    when it is asked for, since most schemes have none.
    """

    scale: torch.Tensor
    second: torch.Tensor
    amax: Callable[[], torch.Tensor]
    columns: int
    first_row: int


@dataclass(frozen=True)
class Format:
    """One scheme as a target stores it: `elements_per_code` of a weight in one of its `codes`.

    `input` is the static scale of the activations, one for all experts, where there is a place for
    it; `needs_input` if the target's loaders cannot do without, and otherwise `note` is what a user
    should know where there is none. A weight's own scale may be given, instead of computed, if
    `takes_weight_scale`. `rows_per_scale` of a weight share one, where engines fuse them by whole
    scales.
    """

    scale: ScaleTensor
    make: Callable[[Place], Scheme]
    codes: torch.dtype = torch.float8_e4m3fn
    elements_per_code: int = 1
    second: ScaleTensor | None = None
    input: ScaleTensor | None = None
    needs_input: bool = False
    note: str | None = None
    takes_weight_scale: bool = False
    rows_per_scale: int = 1


def _tensor(at: Place) -> Scheme:
    return TensorScale(at.scale.view(1), at.amax())


def _row(at: Place) -> Scheme:
    return RowScale(at.scale.view(-1), at.columns, at.first_row)


def _block(at: Place) -> Scheme:
    return BlockScale(at.scale, at.columns, at.first_row)


def _mx(at: Place) -> Scheme:
    return MxScale(at.scale, at.columns, at.first_row)


def _nv(at: Place) -> Scheme:
    second, amax = at.second.view(1), at.amax()
    return NvScale(at.scale, at.columns, at.first_row, second_scale=second, amax=amax)


# For target "hf" the weights' scales are the recipe's profile's.
FORMATS: dict[tuple[str, str], Format] = {
    ("trtllm", "fp8"): Format(
        ScaleTensor("weights_scaling_factor", vector),
        _tensor,
        input=ScaleTensor("activation_scaling_factor", vector),
        needs_input=True,
        takes_weight_scale=True,
    ),
    ("trtllm", "fp8-row"): Format(ScaleTensor("per_channel_scale", of_rows), _row),
    ("hf", "fp8"): Format(
        USUAL["fp8"].scale,
        _tensor,
        input=ScaleTensor(INPUT_SCALE, scalar),
        takes_weight_scale=True,
    ),
    ("hf", "fp8-row"): Format(USUAL["fp8-row"].scale, _row),
    ("hf", "fp8-block"): Format(USUAL["fp8-block"].scale, _block, rows_per_scale=128),
    ("hf", "mxfp8"): Format(USUAL["mxfp8"].scale, _mx),
    ("hf", "nvfp4"): Format(
        USUAL["nvfp4"].scale,
        _nv,
        codes=torch.uint8,
        elements_per_code=2,
        second=ScaleTensor("weight_scale_2", scalar),
        input=ScaleTensor(INPUT_SCALE, scalar),
    ),
}


def format_of(recipe: Recipe) -> Format | None:
    """The recipe's format; None if nothing is quantised.

    Raises:
        RecipeError: the target cannot hold the scheme, or its profile does not read it.
    """
    if recipe.quant == "none":
        return None
    found = FORMATS.get((recipe.target, recipe.quant))
    if found is None:
        fits = ", ".join(quant for target, quant in FORMATS if target == recipe.target)
        raise RecipeError(
            f"target {recipe.target!r} has no layout for weights quantised as {recipe.quant!r}; "
            f"choose one of: none, {fits}"
        )
    if recipe.target != "hf":
        return found
    row = written(recipe)
    return replace(found, scale=row.scale, note=row.note)
