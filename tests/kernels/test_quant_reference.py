"""The reference's schemes against their definitions, in numpy with ml_dtypes' conversions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import BlockScale, MxScale, NvScale, RowScale, Scheme, TensorScale
from fuseport.kernels.reference import fused_copy_ref

F32 = np.float32
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
ROWS, COLUMNS = 200, 288


@pytest.fixture
def source() -> torch.Tensor:
    torch.manual_seed(3)
    spread = torch.exp2(3 * torch.randn(ROWS, 1)) * torch.exp2(2 * torch.randn(1, COLUMNS))
    values = torch.randn(ROWS, COLUMNS) * spread
    values[5], values[130:140, 32:64], values[7, 3] = 0.0, 0.0, -0.0
    return values.bfloat16()


def fill(source: torch.Tensor, quant: Scheme, packed: bool = False) -> np.ndarray:
    columns = COLUMNS // 2 if packed else COLUMNS
    codes = torch.zeros(ROWS, columns, dtype=torch.uint8)
    fused_copy_ref([Move(codes if packed else codes.view(torch.float8_e4m3fn), source, 0.0, quant)])
    return codes.numpy()


def dequant(amax: np.ndarray, largest: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(amax == 0, F32(1), amax.astype(F32) / F32(largest)).astype(F32)


def e4m3(values: np.ndarray) -> np.ndarray:
    codes: np.ndarray = np.clip(values, -448, 448).astype(E4M3).view(np.uint8)
    return codes


def test_tensor(source: torch.Tensor) -> None:
    scale, x = torch.empty(1), source.float().numpy()
    codes = fill(source, TensorScale(scale, torch.empty(1)))
    expected = dequant(np.abs(x).max(), 448)
    assert scale.numpy() == expected
    assert np.array_equal(codes, e4m3(x / expected))


def test_row(source: torch.Tensor) -> None:
    scale, x = torch.empty(ROWS), source.float().numpy()
    codes = fill(source, RowScale(scale, COLUMNS))
    expected = dequant(np.abs(x).max(1), 448)
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(codes, e4m3(x / expected[:, None]))


def test_block(source: torch.Tensor) -> None:
    scale, x = torch.empty(2, 3), source.float().numpy()
    codes = fill(source, BlockScale(scale, COLUMNS))
    for row in range(2):
        for column in range(3):
            here = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            expected = dequant(np.abs(x[here]).max(), 448)
            assert scale[row, column].numpy() == expected
            assert np.array_equal(codes[here], e4m3(x[here] / expected))


def test_mx(source: torch.Tensor) -> None:
    scale = torch.empty(ROWS, COLUMNS // 32, dtype=torch.uint8)
    codes = fill(source, MxScale(scale, COLUMNS))
    x = source.double().numpy().reshape(ROWS, -1, 32)
    amax = np.abs(x).max(2)
    with np.errstate(divide="ignore"):
        exponent = np.where(amax == 0, 0, np.floor(np.log2(amax)) - 8)
    stored = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(stored, np.exp2(exponent))
    scaled = (x / np.exp2(exponent)[..., None]).astype(F32)
    assert np.array_equal(codes.reshape(x.shape), e4m3(scaled))


def test_nv(source: torch.Tensor) -> None:
    scale = torch.empty(ROWS, COLUMNS // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    second = torch.empty(1)
    quant = NvScale(scale, COLUMNS, second_scale=second, amax=torch.empty(1))
    codes = fill(source, quant, packed=True)
    x = source.float().numpy().reshape(ROWS, -1, 16)
    outer = dequant(np.abs(x).max(), 448 * 6)
    assert second.numpy() == outer
    amax = np.abs(x).max(2)
    inner = np.where(amax == 0, F32(1), np.maximum(amax / F32(6) / outer, F32(2.0**-9)))
    stored = np.clip(inner, 0, 448).astype(E4M3)
    assert np.array_equal(scale.view(torch.uint8).numpy(), stored.view(np.uint8))
    scaled = x / (stored.astype(F32) * outer)[..., None]
    four = np.clip(scaled, -6, 6).astype(E2M1).reshape(ROWS, COLUMNS).view(np.uint8) & 15
    assert np.array_equal(codes, four[:, 0::2] | (four[:, 1::2] << 4))
