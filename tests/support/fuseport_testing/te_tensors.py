"""fp8 weights as Transformer Engine keeps them, imitated by classes with its names."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor


class DType(enum.IntEnum):
    kByte = 0
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


class Float8TensorStorage:
    def __init__(self, data: Tensor, scale_inv: Tensor, dtype: DType = DType.kFloat8E4M3) -> None:
        self._data, self._scale_inv, self._fp8_dtype = data, scale_inv, dtype
        self._transpose, self._transpose_invalid = None, True


class Float8Tensor(Float8TensorStorage):
    pass


class Parameter(Float8Tensor):
    """A subclass, as parameters are."""


class Float8BlockwiseQTensor:
    def __init__(
        self, data: Tensor, scale_inv: Tensor, two: bool = True, dtype: DType = DType.kFloat8E4M3
    ) -> None:
        self._rowwise_data, self._rowwise_scale_inv = data, scale_inv
        self._columnwise_data = self._columnwise_scale_inv = None
        self._is_2D_scaled, self._fp8_dtype = two, dtype


class MXFP8Tensor:
    def __init__(
        self, data: Tensor, scale_inv: Tensor, dtype: DType = DType.kFloat8E4M3, **kwargs: Any
    ) -> None:
        self._rowwise_data, self._rowwise_scale_inv, self._fp8_dtype = data, scale_inv, dtype
        vars(self).update(kwargs)


def codes(rows: int, columns: int) -> Tensor:
    drawn = torch.randint(0, 0x7F, (rows, columns), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.uint8)


def blockwise(
    rows: int, columns: int, poison: float = float("nan")
) -> tuple[Float8BlockwiseQTensor, Tensor]:
    """A weight whose padding must not be looked at, and the scales without it."""
    real = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    padded = torch.full((real.shape[0], -(-real.shape[1] // 4) * 4), poison)
    padded[:, : real.shape[1]] = real
    return Float8BlockwiseQTensor(codes(rows, columns), padded), real


def mx(rows: int, columns: int, **kwargs: Any) -> tuple[MXFP8Tensor, Tensor]:
    real = torch.randint(100, 150, (rows, columns // 32), dtype=torch.uint8)
    padded = torch.full((-(-rows // 128) * 128, -(-(columns // 32) // 4) * 4), 0xFF).byte()
    padded[:rows, : columns // 32] = real
    return MXFP8Tensor(codes(rows, columns), padded, **kwargs), real
