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

from ..errors import RecipeError
from ..layout import Shape
from ..recipe import Recipe


@dataclass(frozen=True)
class Written:
    """A scheme as a profile's engines read it: `{module}.{suffix}` of `shape(rows, columns)`."""

    said: str
    suffix: str
    shape: Callable[[int, int], Shape]


def _scalar(rows: int, columns: int) -> Shape:
    return ()


def _one(rows: int, columns: int) -> Shape:
    return (1,)


def _rows(rows: int, columns: int) -> Shape:
    return (rows,)


def _column(rows: int, columns: int) -> Shape:
    return (rows, 1)


def _blocks(rows: int, columns: int) -> Shape:
    return -(-rows // 128), -(-columns // 128)


def _pieces(size: int) -> Callable[[int, int], Shape]:
    return lambda rows, columns: (rows, columns // size)


_FP8 = Written("modelopt", "weight_scale", _scalar)
_BLOCK = Written("fp8", "weight_scale_inv", _blocks)
_MX = Written("modelopt", "weight_scale", _pieces(32))
_NV = Written("modelopt", "weight_scale", _pieces(16))
_CHANNEL = Written("compressed-tensors", "weight_scale", _column)
_TOKEN = Written("modelopt", "weight_scale", _rows)

_USUAL = {"fp8": _FP8, "fp8-row": _CHANNEL, "fp8-block": _BLOCK, "mxfp8": _MX, "nvfp4": _NV}

PROFILES: dict[str, dict[str, Written]] = {
    "vllm": _USUAL,
    "sglang": _USUAL,
    "trtllm": {**_USUAL, "fp8-row": _TOKEN},
    "compressed-tensors": {
        "fp8": Written("compressed-tensors", "weight_scale", _one),
        "fp8-row": _CHANNEL,
        "fp8-block": Written("compressed-tensors", "weight_scale", _blocks),
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
