"""Weights that training keeps in fp8: their codes and scales as they are, never requantised.

Transformer Engine's tensor classes are known by name and read through their attributes, so that
it need not be installed. Attribute names and layouts were read in its sources: `Float8Tensor` of
1.4 to 2.18 (`_data`, `_scale_inv`, `_fp8_dtype`), `MXFP8Tensor` of 2.0 to 2.18 and
`Float8BlockwiseQTensor` of 2.3 to 2.18 (`_rowwise_data`, `_rowwise_scale_inv`). Both names of the
plain storage beside each class (`…Base` up to 2.8, `…Storage` since) are known too.

A dequant_scale multiplies after decoding; Transformer Engine calls it `scale_inv`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fuseport.kernels.codecs import (
    BLOCK,
    MX_COLUMNS,
    dequantise_blocks,
    dequantise_mx,
    dequantise_tensor,
)

from ..errors import ScaleError, ShapeError, UnsupportedOptionError

_E8M0_NAN = 0xFF
# The schemes of stored weights, and what `Recipe.quant` calls them.
QUANTS = {"tensor": "fp8", "block128": "fp8-block", "mx32": "mxfp8"}


@dataclass(frozen=True)
class StoredFp8:
    """A weight as training stored it.

    codes: float8_e4m3fn [o, i]. scales, without padding, by `scheme`:

    - "tensor": fp32 [1];
    - "block128": fp32 [ceil(o/128), ceil(i/128)];
    - "mx32": uint8 e8m0 [o, i/32].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: str


def dequantise(stored: StoredFp8) -> torch.Tensor:
    """The weight's values, fp32 [o, i]."""
    return _DEQUANTISE[stored.scheme](stored.codes, stored.scales)


_DEQUANTISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "tensor": dequantise_tensor,
    "block128": dequantise_blocks,
    "mx32": dequantise_mx,
}


def is_stored_fp8(value: object) -> bool:
    """Whether `value` is one of Transformer Engine's fp8 tensors."""
    return _reader(value) is not None


def read_stored_fp8(value: object, name: str) -> StoredFp8:
    """The codes and scales of one of Transformer Engine's fp8 tensors; `name` is for errors.

    Nothing is copied but scales whose padding is cut off.

    Raises:
        UnsupportedOptionError: another class; e5m2 codes; no row-wise copy; scales for 1×128
            blocks, or in the order of a matrix multiplication.
        ShapeError: the weight is no matrix, or its scales have another shape than its class says.
        ScaleError: a scale is not finite, normal and positive.
    """
    reader = _reader(value)
    if reader is None:
        raise UnsupportedOptionError(
            f"{name} is a {type(value).__name__}, which is none of {', '.join(_READERS)}; "
            f"save the weights in bf16"
        )
    dtype = str(getattr(_attribute(value, "_fp8_dtype", name), "name", ""))
    if dtype != "kFloat8E4M3":
        raise UnsupportedOptionError(
            f"{name} has fp8 dtype {dtype or 'unknown'}, but only kFloat8E4M3 weights are "
            f"converted; train with the e4m3 or hybrid format, or save the weights in bf16"
        )
    return reader(value, name)


def _reader(value: object) -> Callable[[object, str], StoredFp8] | None:
    # Nearly all are plain, and a model has thousands.
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return None
    known = (_READERS.get(cls.__name__) for cls in type(value).__mro__)
    return next((reader for reader in known if reader is not None), None)


def _attribute(value: object, attribute: str, name: str) -> object:
    found = getattr(value, attribute, None)
    if found is None:
        raise UnsupportedOptionError(
            f"{name}: its {attribute} is missing, and nothing else stands for it (a column-wise "
            f"copy is not read); save the model from outside of a forward or backward pass"
        )
    return found


def _tensor(value: object, attribute: str, dtype: torch.dtype, name: str) -> torch.Tensor:
    found = _attribute(value, attribute, name)
    if not isinstance(found, torch.Tensor) or found.dtype is not dtype:
        kind = getattr(found, "dtype", type(found).__name__)
        raise UnsupportedOptionError(f"{name}: its {attribute} is {kind}, expected {dtype}")
    return found.detach()


def _codes(value: object, attribute: str, name: str) -> torch.Tensor:
    raw = _tensor(value, attribute, torch.uint8, name)
    if raw.ndim != 2:
        raise ShapeError(f"{name} has shape {list(raw.shape)}, expected a matrix [out, in]")
    return raw.view(torch.float8_e4m3fn)


def _check_shape(scales: torch.Tensor, expected: tuple[int, ...], name: str) -> None:
    if tuple(scales.shape) != expected:
        raise ShapeError(
            f"{name} has scales {list(scales.shape)}, expected {list(expected)} for its shape; "
            f"was it sliced without its scales?"
        )


def _check_scales(bad: torch.Tensor, name: str) -> None:
    """Raise ScaleError if `bad` is True anywhere; it has the scales' shape."""
    count = int(bad.sum())
    if count:
        where = bad.nonzero()[0].tolist()
        raise ScaleError(
            f"{name}: {count} of {bad.numel()} scales are not finite, normal and positive, the "
            f"first at {where}; the weight was never quantised, or training had diverged"
        )


def _unusable(scales: torch.Tensor) -> torch.Tensor:
    """True where a fp32 scale is zero, subnormal, negative, infinite or NaN."""
    return ~(scales.isfinite() & (scales >= torch.finfo(torch.float32).tiny))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _per_tensor(value: object, name: str) -> StoredFp8:
    codes = _codes(value, "_data", name)
    scale = _tensor(value, "_scale_inv", torch.float32, name)
    _check_shape(scale, (1,), name)
    _check_scales(_unusable(scale), name)
    return StoredFp8(codes, scale, "tensor")


def _blockwise(value: object, name: str) -> StoredFp8:
    """Scales are padded to a multiple of four columns; what is there means nothing."""
    if not getattr(value, "_is_2D_scaled", False):
        raise UnsupportedOptionError(
            f"{name} has a scale for each 1×128 elements, but weights are converted with 128×128 "
            f"blocks only; train with w_block_scaling_dim = 2, or save the weights in bf16"
        )
    codes = _codes(value, "_rowwise_data", name)
    scales = _tensor(value, "_rowwise_scale_inv", torch.float32, name)
    rows, columns = (-(-size // BLOCK) for size in codes.shape)
    _check_shape(scales, (rows, _padded(columns, 4)), name)
    scales = scales[:, :columns].contiguous()
    _check_scales(_unusable(scales), name)
    return StoredFp8(codes, scales, "block128")


def _mx(value: object, name: str) -> StoredFp8:
    """Scales are padded to multiples of [128, 4]; 2.12 and later can keep them swizzled."""
    if getattr(value, "_with_gemm_swizzled_scales", False):
        raise UnsupportedOptionError(
            f"{name} has swizzled scales (_with_gemm_swizzled_scales), in the order of a matrix "
            f"multiplication; save the model without optimize_for_gemm"
        )
    codes = _codes(value, "_rowwise_data", name)
    rows, columns = codes.shape
    if columns % MX_COLUMNS:
        raise ShapeError(f"{name} has {columns} columns, expected a multiple of {MX_COLUMNS}")
    scales = _tensor(value, "_rowwise_scale_inv", torch.uint8, name)
    groups = columns // MX_COLUMNS
    _check_shape(scales, (_padded(rows, 128), _padded(groups, 4)), name)
    scales = scales[:rows, :groups].contiguous()
    _check_scales(scales == _E8M0_NAN, name)
    return StoredFp8(codes, scales, "mx32")


_READERS: dict[str, Callable[[object, str], StoredFp8]] = {
    f"{kind}{role}": reader
    for kind, reader in (
        ("Float8Tensor", _per_tensor),
        ("Float8BlockwiseQTensor", _blockwise),
        ("MXFP8Tensor", _mx),
    )
    for role in ("", "Base", "Storage")
}
