"""Who reads the Hugging Face layout, and how each is told of quantised weights: a row a scheme.

Engines read the same codes and differ in where they look: ModelOpt's `hf_quant_config.json`
("modelopt"), or `quantization_config` in config.json, in transformers' fp8 format ("fp8") or as
compressed-tensors writes it. The scales' names and shapes go with that.

Sources: TensorRT-LLM's PyTorch backend reads scales of rows as [out] under ModelOpt's
`FP8_PER_CHANNEL_PER_TOKEN`; vLLM and SGLang as [out, 1] under compressed-tensors' "channel".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..layout import Shape
from ..recipe import Recipe


@dataclass(frozen=True)
class ScaleTensor:
    """`{module}.{suffix}` of `shape(rows, columns)`, after any experts."""

    suffix: str
    shape: Callable[[int, int], Shape]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Written:
    """A scheme as a profile's engines read it: where it is said, and the weights' scales."""

    said: str
    scale: ScaleTensor


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


_CHANNEL = Written("compressed-tensors", ScaleTensor("weight_scale", _column))

# What most engines read.
USUAL = {
    "fp8": Written("modelopt", ScaleTensor("weight_scale", scalar)),
    "fp8-row": _CHANNEL,
    "fp8-block": Written("fp8", ScaleTensor("weight_scale_inv", _blocks)),
    "mxfp8": Written("modelopt", ScaleTensor("weight_scale", _pieces(32), torch.uint8)),
    "nvfp4": Written("modelopt", ScaleTensor("weight_scale", _pieces(16), torch.float8_e4m3fn)),
}

PROFILES: dict[str, dict[str, Written]] = {
    "vllm": USUAL,
    "sglang": USUAL,
    "trtllm": {**USUAL, "fp8-row": Written("modelopt", ScaleTensor("weight_scale", of_rows))},
    "compressed-tensors": {
        "fp8": Written("compressed-tensors", ScaleTensor("weight_scale", vector)),
        "fp8-row": _CHANNEL,
        "fp8-block": Written("compressed-tensors", ScaleTensor("weight_scale", _blocks)),
    },
}


def written(recipe: Recipe) -> Written:
    """How the recipe's profile reads its scheme.

    Raises:
        RecipeError: it does not.
    """
    rows = PROFILES[recipe.profile]
    if recipe.quant not in rows:
        raise RecipeError(
            f"profile {recipe.profile!r} reads no weights quantised as {recipe.quant!r}; choose "
            f"one of: none, {', '.join(rows)}, or another profile"
        )
    return rows[recipe.quant]
