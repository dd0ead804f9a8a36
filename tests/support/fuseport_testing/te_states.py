"""`_extra_state` as each version of Transformer Engine writes it, and crafted ones.

The recipe classes bear Transformer Engine's names, and are found under them only while a state
is pickled.
"""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

_RECIPES = "transformer_engine.common.recipe"


class FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = FormatHelper(448, 448)
    HYBRID = FormatHelper(448, 57344)


class Recipe:
    """Fields are kept in the instance, as a pydantic dataclass does."""

    def __init__(self) -> None:
        self.margin, self.fp8_format, self.amax_history_len = 0, Format.HYBRID, 16


class DelayedScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


_CLASSES = {
    "_FormatHelper": FormatHelper,
    "Format": Format,
    "DelayedScaling": DelayedScaling,
    "MXFP8BlockScaling": MXFP8BlockScaling,
}


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    parts = _RECIPES.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    modules = {name: types.ModuleType(name) for name in names}
    for name, cls in _CLASSES.items():
        cls.__module__, cls.__qualname__, cls.__name__ = _RECIPES, name, name
        setattr(modules[_RECIPES], name, cls)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def byte_tensor(state: object) -> torch.Tensor:
    """What versions from 1.14 on keep."""
    with _registered():
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def saved(state: object) -> io.BytesIO:
    """What versions up to 1.13 keep, and what a checkpoint's byte entry is."""
    buffer = io.BytesIO()
    with _registered():
        torch.save(state, buffer)
    return buffer


def scales(gemms: int = 1, order: str = "by_gemm", steps: int = 16) -> dict[str, torch.Tensor]:
    """Scales (2 + gemm)·(1, 10, -) for input, weight, output; outputs were never looked at."""
    scale = torch.ones(3, gemms)
    scale[0] = torch.arange(gemms) + 2.0
    scale[1] = scale[0] * 10
    history = torch.zeros(steps, 3, gemms)
    history[steps // 2, :2] = 448 / scale[:2]
    if order == "by_gemm":
        scale, history = scale.T, history.transpose(1, 2)
    return {
        "scale_fwd": scale.reshape(-1).contiguous(),
        "amax_history_fwd": history.reshape(steps, -1).contiguous(),
        "scale_bwd": torch.ones(2 * gemms),
        "amax_history_bwd": torch.zeros(steps, 2 * gemms),
    }


def extras(gemms: int) -> dict[str, Any]:
    return {
        "fp8_checkpoint": True,
        "num_gemms": gemms,
        "fp8_max_fwd": 448.0,
        "fp8_max_bwd": 57344.0,
        "global_fp8_buffer_pos_fwd_recompute": [1],
        "async_amax_reduction": (False,),
    }


def state_1(gemms: int = 1, order: str = "by_gemm", **replaced: object) -> dict[str, object]:
    """Up to 1.14: with the reciprocals, backward ones too, and no recipe."""
    state: dict[str, object] = {}
    for key, value in scales(gemms, order).items():
        state[key] = value
        if key.startswith("scale"):
            state[key.replace("scale", "scale_inv")] = 1 / value
    return state | {"extra_fp8_variables": extras(gemms)} | replaced


def state_2(gemms: int = 1, order: str = "by_gemm", **replaced: object) -> dict[str, object]:
    """From 2.0 on, under delayed scaling."""
    recipe = {"recipe": DelayedScaling()}
    return recipe | scales(gemms, order) | {"extra_fp8_variables": extras(gemms)} | replaced


def split(state: dict[str, Any], gemms: int) -> list[dict[str, Any]]:
    """What Megatron-Core cuts a grouped linear's state into: views of the whole."""
    extra = state["extra_fp8_variables"] | {"num_gemms": 1}
    return [
        {
            "extra_fp8_variables": extra,
            "recipe": state["recipe"],
            "scale_fwd": state["scale_fwd"].view(3, -1)[:, gemm],
            "amax_history_fwd": state["amax_history_fwd"].view(16, 3, -1)[:, :, gemm],
        }
        for gemm in range(gemms)
    ]


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call
