"""The quantisation schemes by their formulas, in fp64: what any implementation aims at.

Nothing of the package is used, and nothing of its way: no codes are made. A value goes to the
nearest one of the format's (ties to the even code), found in a list of them, and comes back as
fp64. Scales stay fp64, where the format does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
# Fused matrices (q, k and v; gate and up) → the same, quantised and dequantised.
Scheme = Callable[[Sequence[Matrix]], list[Matrix]]


def _magnitudes(dtype: type) -> Matrix:
    """Every finite magnitude of a format, by its code."""
    bits = np.dtype(dtype).itemsize * 8 if dtype is not ml_dtypes.float4_e2m1fn else 4
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    finite: Matrix = values[np.isfinite(values)]
    return finite


E4M3, E2M1 = _magnitudes(ml_dtypes.float8_e4m3fn), _magnitudes(ml_dtypes.float4_e2m1fn)


def nearest(values: Matrix, magnitudes: Matrix) -> Matrix:
    """Each value's nearest one with its own sign; beyond the largest, that."""
    wanted = np.abs(values)
    above = np.searchsorted(magnitudes, wanted).clip(1, len(magnitudes) - 1)
    low, high = magnitudes[above - 1], magnitudes[above]
    up = wanted - low > high - wanted
    tie = wanted - low == high - wanted
    rounded: Matrix = np.copysign(np.where(up | (tie & (above % 2 == 0)), high, low), values)
    return rounded


def _scaled(values: Matrix, scales: Matrix, magnitudes: Matrix) -> Matrix:
    return nearest(values / scales, magnitudes) * scales


def _or_one(amax: Matrix) -> Matrix:
    return np.where(amax == 0, 1.0, amax)


def _largest(group: Sequence[Matrix]) -> Matrix:
    return _or_one(np.max([np.abs(one).max() for one in group]))


def _tensor(group: Sequence[Matrix]) -> list[Matrix]:
    scale = _largest(group) / 448
    return [_scaled(one, scale, E4M3) for one in group]


def _row(group: Sequence[Matrix]) -> list[Matrix]:
    return [_scaled(w, _or_one(np.abs(w).max(1, keepdims=True)) / 448, E4M3) for w in group]


def _block(group: Sequence[Matrix]) -> list[Matrix]:
    return [_blocks(one) for one in group]


def _blocks(weight: Matrix) -> Matrix:
    result = np.empty_like(weight)
    for row in range(0, len(weight), 128):
        for column in range(0, weight.shape[1], 128):
            part = np.s_[row : row + 128, column : column + 128]
            result[part] = _tensor([weight[part]])[0]
    return result


def _pieces(weight: Matrix, size: int) -> tuple[Matrix, Matrix]:
    """A row's pieces, and the largest magnitude of each."""
    pieces = weight.reshape(len(weight), -1, size)
    return pieces, np.abs(pieces).max(2, keepdims=True)


def _mx(group: Sequence[Matrix]) -> list[Matrix]:
    result = []
    for weight in group:
        pieces, amax = _pieces(weight, 32)
        scales = 2.0 ** (np.floor(np.log2(_or_one(amax))) - 8)
        result.append(_scaled(pieces, scales, E4M3).reshape(weight.shape))
    return result


def _nv(group: Sequence[Matrix]) -> list[Matrix]:
    second, result = _largest(group) / (448 * 6), []
    for weight in group:
        pieces, amax = _pieces(weight, 16)
        scales = np.maximum(nearest(_or_one(amax) / 6 / second, E4M3), 2.0**-9) * second
        result.append(_scaled(pieces, scales, E2M1).reshape(weight.shape))
    return result


SCHEMES: dict[str, Scheme] = {
    "fp8": _tensor,
    "fp8-row": _row,
    "fp8-block": _block,
    "mxfp8": _mx,
    "nvfp4": _nv,
}
