"""Transformer Engine's fp8 tensors as its versions pickle them: codes that a file really holds.

The classes bear Transformer Engine's names, and are found under them only while they are pickled.
"""

from __future__ import annotations

import contextlib
import copyreg
import enum
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import te_tensors as te

_ROOT = "transformer_engine.pytorch"
_HOMES = {
    "Float8Tensor": f"{_ROOT}.tensor.float8_tensor",
    "MXFP8Tensor": f"{_ROOT}.tensor.mxfp8_tensor",
    "Float8BlockwiseQTensor": f"{_ROOT}.tensor.float8_blockwise_tensor",
    "NVFP4Tensor": f"{_ROOT}.tensor.nvfp4_tensor",
}
_FUNCTIONS = {
    "Float8Tensor": "float8",
    "MXFP8Tensor": "mxfp8",
    "Float8BlockwiseQTensor": "float8_blockwise",
    "NVFP4Tensor": "nvfp4",
}


class DType:
    """A pybind11 enum's value: made without arguments, its number is its state."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (DType,), self.number  # type: ignore[attr-defined]


class NewDType(enum.IntEnum):
    """Since 2.17 a Python enum."""

    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


class Quantizer:
    """What a tensor was quantised with; it has tensors of its own."""

    def __init__(self) -> None:
        self.amax = torch.zeros(1)


def _arguments(one: Any, dtype: object) -> tuple[object, ...]:
    """What a tensor's rebuild function takes, in the form of Transformer Engine 2.9."""
    if isinstance(one, te.Float8Tensor):
        return one._data, dtype, one._scale_inv, torch.bfloat16, one._data.shape
    rows = (one._rowwise_data, one._rowwise_scale_inv)
    shape = rows[0].shape
    if isinstance(one, te.MXFP8Tensor):
        return *rows, None, None, dtype, torch.bfloat16, shape, Quantizer()
    return shape, *rows, None, None, dtype, torch.bfloat16, Quantizer(), one._is_2D_scaled, None


class _Method:
    """Up to 2.16: a class method, which pickles as the class's attribute."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._make_in_reduce_ex, _arguments(self.one, DType(7))

    @classmethod
    def _make_in_reduce_ex(cls, *arguments: object) -> None:
        raise AssertionError("it was called")


class _Function(_Method):
    """Since 2.17: a function of the module."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        home = sys.modules[type(self).__module__]
        (rebuild,) = (value for name, value in vars(home).items() if "reduce_ex" in name)
        return rebuild, _arguments(self.one, NewDType.kFloat8E4M3)


def pickled(one: Any, form: str = "method", kind: str | None = None) -> Any:
    """A stand-in that pickles as the tensor does; `form` is "method" or "function"."""
    base = {"method": _Method, "function": _Function}[form]
    name = kind or type(one).__name__
    return type(name, (base,), {"__module__": _HOMES[name], "__qualname__": name})(one)


def _unused() -> Any:
    def rebuild(*_: object) -> None:
        raise AssertionError("it was called")

    return rebuild


@contextlib.contextmanager
def registered(values: list[Any]) -> Iterator[None]:
    """Classes and rebuild functions under the names by which pickle looks them up."""
    modules: dict[str, types.ModuleType] = {}

    def put(home: str, name: str, value: Any) -> None:
        parts = home.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            modules.setdefault(path, types.ModuleType(path))
        value.__module__, value.__qualname__ = home, name
        setattr(modules[home], name, value)

    put("transformer_engine_torch", "DType", DType)
    put(f"{_ROOT}.constants", "DType", NewDType)
    put(f"{_ROOT}.tensor.float8_tensor", "Quantizer", Quantizer)
    for one in values:
        cls = type(one)
        put(cls.__module__, cls.__name__, cls)
        put(cls.__module__, f"_make_{_FUNCTIONS[cls.__name__]}_tensor_in_reduce_ex", _unused())
    sys.modules.update(modules)
    try:
        yield
    finally:
        for path in modules:
            del sys.modules[path]


def save_rank(path: Path, model: dict[str, Any], facts: object) -> None:
    """One rank's file of a legacy checkpoint, with these tensors and stand-ins."""
    path.mkdir(parents=True)
    stand_ins = [one for one in model.values() if isinstance(one, _Method)]
    # Pickle looks a class up by name, so those of one name must be one class.
    first = {type(one).__name__: type(one) for one in stand_ins}
    for one in stand_ins:
        one.__class__ = first[type(one).__name__]
    with registered(stand_ins):
        torch.save({"args": facts, "checkpoint_version": 3.0, "model": model},
                   path / "model_optim_rng.pt")  # fmt: skip
