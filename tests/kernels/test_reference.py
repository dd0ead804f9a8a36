"""The reference's casts against ml_dtypes, on every code and on hard cases."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from fuseport.kernels.reference import downcast_ref

NUMPY = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
}


def hard_values() -> np.ndarray:
    """Random bit patterns, and every e4m3 value, midpoint and their neighbours."""
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 18, dtype=np.uint32)
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    near = [np.nextafter(points, np.float32(way)) for way in (-np.inf, np.inf)]
    return np.concatenate([bits.view(np.float32), points, *near]).astype(np.float32)


@pytest.mark.parametrize("dtype", NUMPY)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    values = hard_values()
    values = values[~np.isnan(values)]
    limited = np.clip(values, -448, 448) if dtype is torch.float8_e4m3fn else values
    with np.errstate(over="ignore"):
        expected = limited.astype(NUMPY[dtype])
    found = downcast_ref(torch.from_numpy(values), dtype)
    width = np.uint8 if dtype.itemsize == 1 else np.uint16
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    assert np.array_equal(found.view(integer).numpy().view(width), expected.view(width))


def test_nan_has_one_code_in_each_format() -> None:
    nans = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    codes = {
        torch.float32: 0x7FC00000,
        torch.bfloat16: 0x7FC0,
        torch.float16: 0x7E00,
        torch.float8_e4m3fn: 0x7F,
    }
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    for dtype, code in codes.items():
        found = downcast_ref(nans, dtype).view(integers[dtype.itemsize])
        assert found.tolist() == [code] * 3


def test_saturation_and_infinity() -> None:
    values = torch.tensor([1e30, -1e30, float("inf"), -float("inf")])
    assert downcast_ref(values, torch.float8_e4m3fn).float().tolist() == [448, -448, 448, -448]
    infinity = float("inf")
    expected = [infinity, -infinity, infinity, -infinity]
    assert downcast_ref(values, torch.float16).float().tolist() == expected
