"""Who reads the Hugging Face layout, and how each is told of quantised weights: a row a scheme.

Engines read the same codes and differ in what they are told: ModelOpt's words ("modelopt"), those
of transformers' fp8 format ("fp8"), or compressed-tensors'. The scales' names and shapes go with
that.

Sources: TensorRT-LLM's PyTorch backend reads scales of rows as [out] under ModelOpt's
`FP8_PER_CHANNEL_PER_TOKEN`; vLLM and SGLang as [out, 1] under compressed-tensors' "channel". Under
ModelOpt's `FP8` and `NVFP4` these two take static scales of activations for granted, and compute
with what lay in memory where there are none (`ModelOptLinearMethod` of vLLM 0.33,
`ModelOptFp8LinearMethod` of SGLang 0.5.23); TensorRT-LLM scales activations as they come then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import RecipeError
from ..layout import Shape
from ..recipe import Recipe

# The static scale of a linear's activations, where it has one.
INPUT_SCALE = "input_scale"


@dataclass(frozen=True)
class ScaleTensor:
    """`{module}.{suffix}` of `shape(rows, columns)`, after any experts."""

    suffix: str
    shape: Callable[[int, int], Shape]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Written:
    """A scheme as a profile's engines read it: in whose words it is said, and the weights' scales.

    `algorithm` is ModelOpt's name of it, where these are its words. `dynamic` is what is said
    instead where the result has no static scales of activations, and `note` what a user should
    know then.
    """

    said: str
    scale: ScaleTensor
    algorithm: str | None = None
    dynamic: Written | None = None
    note: str | None = None


def scalar(rows: int, columns: int) -> Shape:
    """One scale for a matrix, without axes."""
    return ()


def vector(rows: int, columns: int) -> Shape:
    """One scale for a matrix, as a vector."""
    return (1,)


def of_rows(rows: int, columns: int) -> Shape:
    """A scale for each row."""
    return (rows,)


def _column(rows: int, columns: int) -> Shape:
    return (rows, 1)


def _blocks(rows: int, columns: int) -> Shape:
    return -(-rows // 128), -(-columns // 128)


def _pieces(size: int) -> Callable[[int, int], Shape]:
    return lambda rows, columns: (rows, columns // size)


_FP8 = Written("modelopt", ScaleTensor("weight_scale", scalar), "FP8")
_CHANNEL = Written("compressed-tensors", ScaleTensor("weight_scale", _column))
_BLOCK = Written("fp8", ScaleTensor("weight_scale_inv", _blocks))
_MX = Written("modelopt", ScaleTensor("weight_scale", _pieces(32), torch.uint8), "MXFP8")
_NV = Written("modelopt", ScaleTensor("weight_scale", _pieces(16), torch.float8_e4m3fn), "NVFP4")

_NO_STATIC = "no static scales of activations were given (--scales): "
# What most engines read.
USUAL = {
    "fp8": replace(_FP8, dynamic=Written("fp8", _FP8.scale)),
    "fp8-row": _CHANNEL,
    "fp8-block": _BLOCK,
    "mxfp8": _MX,
    "nvfp4": replace(
        _NV,
        dynamic=replace(_NV, algorithm="W4A16_NVFP4"),
        note=_NO_STATIC + "the result says W4A16_NVFP4, and activations stay in 16 bits",
    ),
}

PROFILES: dict[str, dict[str, Written]] = {
    "vllm": USUAL,
    "sglang": USUAL,
    "trtllm": {
        "fp8": _FP8,
        "fp8-row": Written(
            "modelopt", ScaleTensor("weight_scale", of_rows), "FP8_PER_CHANNEL_PER_TOKEN"
        ),
        "fp8-block": _BLOCK,
        "mxfp8": _MX,
        "nvfp4": replace(
            _NV, note=_NO_STATIC + "TensorRT-LLM must be able to scale activations as they come"
        ),
    },
    "compressed-tensors": {
        "fp8": Written("compressed-tensors", ScaleTensor("weight_scale", vector)),
        "fp8-row": _CHANNEL,
        "fp8-block": Written("compressed-tensors", ScaleTensor("weight_scale", _blocks)),
    },
}


def written(recipe: Recipe, static: bool = True) -> Written:
    """How the recipe's profile reads its scheme, with `static` scales of activations or without.

    Raises:
        RecipeError: it does not.
    """
    rows = PROFILES[recipe.profile]
    if recipe.quant not in rows:
        raise RecipeError(
            f"profile {recipe.profile!r} reads no weights quantised as {recipe.quant!r}; choose "
            f"one of: none, {', '.join(rows)}, or another profile"
        )
    row = rows[recipe.quant]
    return row if static or row.dynamic is None else row.dynamic
