"""fp8 weights in a `torch.save` file, as Transformer Engine pickles them, without running it.

Megatron's legacy checkpoints hold what `state_dict()` gave, so an fp8 parameter's codes and scales
are in them. (A `torch_dist` checkpoint has bf16 there: its writer copies tensors to the host, and
up to Transformer Engine 2.16 such a copy is dequantised.) A pickled tensor is a call of a rebuild
function with the tensor's parts. It used to be a class method, which pickles as `getattr` of the
class; since 2.17 it is a function. Neither is called here: inert classes keep the arguments.

Source: `__reduce_ex__` of the three classes in Transformer Engine 1.4 to 2.18.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from ..errors import UnsafeSourceError, UnsupportedOptionError
from .safe_pickle import Inert, inert_class
from .stored_fp8 import StoredFp8, read_stored_fp8

_GETATTR, _METHOD = "builtins.getattr", "_make_in_reduce_ex"
_FUNCTIONS = {
    "_make_float8_tensor_in_reduce_ex": "Float8Tensor",
    "_make_mxfp8_tensor_in_reduce_ex": "MXFP8Tensor",
    "_make_float8_blockwise_tensor_in_reduce_ex": "Float8BlockwiseQTensor",
}
# A class's parts in the order of the rebuild function's arguments; later versions have more.
_PARTS: dict[str, tuple[str, ...]] = {
    "Float8Tensor": ("_data", "_fp8_dtype", "_scale_inv"),
    "MXFP8Tensor": (
        "_rowwise_data", "_rowwise_scale_inv", "columns", "columns_scale", "_fp8_dtype", "dtype",
        "shape", "quantizer", "_with_gemm_swizzled_scales",
    ),
    "Float8BlockwiseQTensor": (
        "shape", "_rowwise_data", "_rowwise_scale_inv", "columns", "columns_scale", "_fp8_dtype",
        "dtype", "quantizer", "_is_2D_scaled",
    ),
}  # fmt: skip
# kFloat8E4M3's number: up to Transformer Engine 2.3, and since. The other meaning of 7, e5m2 in the
# older ones, is no weight's: they refuse to train in pure e5m2.
_E4M3 = (6, 7)


def stubs(names: Iterable[str], where: str) -> list[tuple[object, str]]:
    """What stands for the classes and functions that a file names, for torch's safe loader.

    Raises:
        UnsafeSourceError: one of them is not known.
    """
    known = set(names)
    made: list[type[Inert]] = [inert_class(name, where) for name in known - {_GETATTR}]
    found: list[tuple[object, str]] = [(one, one.path) for one in made]
    if _GETATTR not in known:
        return found
    methods = {
        one: inert_class(f"{one.path}.{_METHOD}", where)
        for one in made
        if one.path.startswith("transformer_engine.")
    }

    def attribute(owner: object, name: object) -> type[Inert]:
        method = methods.get(owner) if isinstance(owner, type) and name == _METHOD else None
        if method is None:
            raise UnsafeSourceError(
                f"{where}: the pickle asks for the attribute {name!r} of {owner!r}; only an fp8 "
                f"tensor's {_METHOD} is known. Nothing was run."
            )
        return method

    return [*found, *((one, one.path) for one in methods.values()), (attribute, _GETATTR)]


def pickled_fp8(value: Inert, name: str) -> StoredFp8 | None:
    """The codes and scales of a pickled fp8 tensor; None if it is no tensor of any kind.

    Raises:
        UnsupportedOptionError, ShapeError, ScaleError: as `read_stored_fp8`; also for another of
            Transformer Engine's tensors.
    """
    *_, owner, last = ("", *value.path.split("."))
    kind = owner if last == _METHOD else _FUNCTIONS.get(last)
    if kind not in _PARTS:
        if "_in_reduce_ex" not in last:
            return None
        raise UnsupportedOptionError(
            f"{name} is stored through {value.path}; fp8 weights are read from "
            f"{', '.join(_PARTS)} only: save the weights in bf16"
        )
    parts = dict(zip(_PARTS[kind], value.args, strict=False))
    parts["_fp8_dtype"] = SimpleNamespace(name=_dtype(parts.get("_fp8_dtype")))
    return read_stored_fp8(type(kind, (SimpleNamespace,), {})(**parts), name)


def _dtype(value: object) -> str:
    """Its name; an enum pickles as a call with its number, or with the number as its state."""
    if not isinstance(value, Inert):
        return ""
    number = value.args[0] if value.args else value.state
    return "kFloat8E4M3" if number in _E4M3 else f"number {number!r}"
