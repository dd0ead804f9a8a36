"""The decoders against ml_dtypes on every code, and the helpers against one value at a time."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

from fuseport.kernels.codecs import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    dequantise_blocks,
    dequantise_mx,
    dequantise_nvfp4,
    dequantise_rows,
    dequantise_tensor,
    unpack_e2m1,
)

Decode = Callable[[torch.Tensor], torch.Tensor]
FORMATS = [
    (decode_e4m3, ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, 256),
    (decode_e8m0, ml_dtypes.float8_e8m0fnu, torch.float8_e8m0fnu, 256),
    (decode_e2m1, ml_dtypes.float4_e2m1fn, torch.uint8, 16),
]
NAMES = ["e4m3", "e8m0", "e2m1"]


def same_values(found: torch.Tensor, expected: np.ndarray) -> None:
    """Equal bits, except that one NaN is as good as another."""
    assert found.dtype is torch.float32
    ours, wanted = found.numpy(), expected.astype(np.float32)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(ours), nan)
    wrong = np.argwhere((ours.view(np.uint32) != wanted.view(np.uint32)) & ~nan)
    assert len(wrong) == 0, f"{tuple(wrong[0])}: {ours[tuple(wrong[0])]}, {wanted[tuple(wrong[0])]}"


@pytest.mark.parametrize(("decode", "numpy", "dtype", "count"), FORMATS, ids=NAMES)
def test_every_code(decode: Decode, numpy: type, dtype: torch.dtype, count: int) -> None:
    codes = np.arange(count, dtype=np.uint8)
    same_values(decode(torch.from_numpy(codes)), codes.view(numpy))
    same_values(decode(torch.from_numpy(codes).view(dtype)), codes.view(numpy))


def test_codes_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="one byte"):
        decode_e4m3(torch.zeros(3, dtype=torch.int16))


def test_every_pair_of_e2m1_is_unpacked_low_first() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    found = unpack_e2m1(packed)
    assert found.shape == (4, 128)
    expected = [code for byte in range(256) for code in (byte % 16, byte // 16)]
    assert found.flatten().tolist() == expected


def codes_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any codes but e4m3's NaN."""
    drawn = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.where(drawn & 0x7F == 0x7F, 0, drawn).astype(np.uint8)


def fp32_of(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-4, 3, shape).astype(np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    values: np.ndarray = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


SHAPES = [(1, 1), (63, 127), (128, 128), (129, 257), (300, 1), (0, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_scale(shape: tuple[int, int]) -> None:
    codes, scale = codes_of(shape), np.float32(0.37)
    expected = e4m3(codes) * scale
    same_values(dequantise_tensor(torch.from_numpy(codes), float(scale)), expected)
    same_values(dequantise_tensor(torch.from_numpy(codes), torch.tensor([scale])), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_for_each_row(shape: tuple[int, int]) -> None:
    codes, scales = codes_of(shape), fp32_of(shape[:1])
    expected = np.array([value * scale for value, scale in zip(e4m3(codes), scales, strict=True)])
    for given in (torch.from_numpy(scales), torch.from_numpy(scales)[:, None]):
        same_values(dequantise_rows(torch.from_numpy(codes), given), expected.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_for_each_block(shape: tuple[int, int]) -> None:
    codes = codes_of(shape)
    scales = fp32_of(((shape[0] + 127) // 128, (shape[1] + 127) // 128))
    expected = e4m3(codes).copy()
    for row, column in np.ndindex(shape):
        expected[row, column] *= scales[row // 128, column // 128]
    same_values(dequantise_blocks(torch.from_numpy(codes), torch.from_numpy(scales)), expected)


@pytest.mark.parametrize("shape", [(1, 32), (63, 96), (3, 160), (0, 32)])
def test_mx(shape: tuple[int, int]) -> None:
    codes = codes_of(shape)
    scales = np.random.default_rng(2).integers(0, 255, (shape[0], shape[1] // 32), dtype=np.uint8)
    expected = e4m3(codes).copy()
    with np.errstate(over="ignore"):
        for row, column in np.ndindex(shape):
            scale = scales.view(ml_dtypes.float8_e8m0fnu)[row, column // 32].astype(np.float32)
            expected[row, column] *= scale
    same_values(dequantise_mx(torch.from_numpy(codes), torch.from_numpy(scales)), expected)


@pytest.mark.parametrize("shape", [(1, 16), (63, 48), (5, 160), (0, 16)])
def test_nvfp4(shape: tuple[int, int]) -> None:
    packed = np.random.default_rng(3).integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    scales, second = codes_of((shape[0], shape[1] // 16), 4), np.float32(0.013)
    expected = np.zeros(shape, np.float32)
    for row, column in np.ndindex(shape):
        byte = packed[row, column // 2]
        code = np.uint8(byte & 15 if column % 2 == 0 else byte >> 4)
        value = code.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        expected[row, column] = value * (e4m3(scales)[row, column // 16] * second)
    found = dequantise_nvfp4(torch.from_numpy(packed), torch.from_numpy(scales), float(second))
    same_values(found, expected)


def test_scales_that_do_not_fit_are_refused() -> None:
    codes = torch.zeros(130, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expected \[130\]"):
        dequantise_rows(codes, torch.ones(129))
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        dequantise_blocks(codes, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"expected \[130, 2\]"):
        dequantise_mx(codes, torch.zeros(130, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="groups of 32"):
        dequantise_mx(codes[:, :40], torch.zeros(130, 1, dtype=torch.uint8))
