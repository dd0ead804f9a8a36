"""How a move quantises: one frozen dataclass a scheme, each with the tensors its scales land in.

`quant_scale` multiplies before the cast, `dequant_scale` multiplies after it. Computed scales come
from the amax, the largest finite magnitude: NaN and Inf take no part in it (a NaN stays NaN where
the format has one, an Inf saturates; both are counted). An amax of 0 gives a scale of 1.0, and no
fp32 scale is below 2⁻⁹⁰ and no e4m3 scale below 2⁻⁹, so that all are finite and positive.

    scheme        codes   a scale for          dequant_scale
    GivenScale    e4m3    the whole move       given
    TensorScale   e4m3    all moves of a group amax / 448, fp32
    RowScale      e4m3    a row                amax / 448, fp32
    BlockScale    e4m3    128 × 128            amax / 448, fp32
    MxScale       e4m3    1 × 32               2^(⌊log2 amax⌋ − 8), E8M0
    NvScale       e2m1    1 × 16               e4m3(amax / 6 / second), second = amax / (448 · 6)

Sources: OCP Microscaling Formats (MX) specification 1.0, section 6.3, for MxScale (the exponent is
rounded down, so a block's largest elements may saturate); NVIDIA ModelOpt's NVFP4 for NvScale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

import torch

E4M3, E2M1_PAIRS = torch.float8_e4m3fn, torch.uint8


def _check_number(name: str, tensor: torch.Tensor) -> None:
    # Kernels are given addresses alone, and would take another dtype for fp32.
    if tensor.dtype is not torch.float32 or tensor.numel() != 1:
        raise ValueError(
            f"{name} must be an fp32 tensor of one element, found {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )


@dataclass(frozen=True)
class GivenScale:
    """Quantise with a scale that is known beforehand: `dst = saturate(src * quant_scale)`.

    `quant_scale` is a Python float, or an fp32 tensor of one element on the device of the move
    (read by the kernel, so that no value has to come to the host).

    Raises:
        TypeError, ValueError: it is something else.
    """

    codes: ClassVar[torch.dtype] = E4M3
    quant_scale: float | torch.Tensor

    def __post_init__(self) -> None:
        given: object = self.quant_scale
        if isinstance(given, torch.Tensor):
            _check_number("quant_scale", given)
        elif not isinstance(given, Real):
            raise TypeError(
                f"quant_scale must be a number or a tensor, found {type(given).__name__}"
            )


@dataclass(frozen=True)
class TensorScale:
    """One computed scale for all moves of a batch that share `amax`, in one tensor or in several.

    Attributes:
        dequant_scale: fp32 [1], written.
        amax: fp32 [1], scratch; the group's.
    """

    codes: ClassVar[torch.dtype] = E4M3
    dequant_scale: torch.Tensor
    amax: torch.Tensor

    def __post_init__(self) -> None:
        _check_number("dequant_scale", self.dequant_scale)
        _check_number("amax", self.amax)


@dataclass(frozen=True)
class Regional:
    """Schemes with a scale for each region of a matrix.

    A move's `dst` is then a contiguous run of whole rows of that matrix.

    Attributes:
        dequant_scale: [⌈rows / region rows⌉, ⌈columns / region columns⌉], the whole matrix's,
            contiguous; written. All moves of the matrix name the same tensor.
        columns: elements in one row of the matrix.
        first_row: the row of the matrix at which the move begins.

    Raises:
        ValueError: the scales have another dtype, gaps, or another number across a row; or regions
            that are pieces of a row do not divide it.
    """

    codes: ClassVar[torch.dtype] = E4M3
    scales: ClassVar[torch.dtype] = torch.float32
    region: ClassVar[tuple[int, int]]
    dequant_scale: torch.Tensor
    columns: int
    first_row: int = 0

    def __post_init__(self) -> None:
        if self.dequant_scale.dtype is not self.scales or not self.dequant_scale.is_contiguous():
            raise ValueError(
                f"{type(self).__name__} needs a contiguous {self.scales} tensor for its scales, "
                f"not {self.dequant_scale.dtype} with strides {self.dequant_scale.stride()}"
            )
        if type(self.columns) is not int or self.columns < 1 or self.columns % self.multiple:
            raise ValueError(
                f"{type(self).__name__} needs rows of a multiple of {self.multiple} elements, "
                f"found {self.columns}"
            )
        across = -(-self.columns // (self.region[1] or self.columns))
        if self.dequant_scale.shape[1:].numel() != across:
            raise ValueError(
                f"{type(self).__name__} needs {across} scales across {self.columns} elements, "
                f"found shape {list(self.dequant_scale.shape)}"
            )

    @property
    def rows(self) -> int:
        """The rows of the matrix for which there are scales, the last region filled up."""
        return self.region[0] * self.dequant_scale.shape[0]

    @property
    def multiple(self) -> int:
        """What a row's length must be a multiple of; formats of one row's pieces have no rests."""
        return self.region[1] if self.region[0] == 1 and self.region[1] else 1


@dataclass(frozen=True)
class RowScale(Regional):
    """A scale for each row: `dequant_scale` is fp32 [rows]."""

    region: ClassVar[tuple[int, int]] = (1, 0)


@dataclass(frozen=True)
class BlockScale(Regional):
    """A scale for each block of 128 × 128: fp32 [⌈rows / 128⌉, ⌈columns / 128⌉].

    The last block of a row or column may be smaller.
    """

    region: ClassVar[tuple[int, int]] = (128, 128)


@dataclass(frozen=True)
class MxScale(Regional):
    """MXFP8: a power of two for each 32 elements of a row, uint8 (E8M0) [rows, columns / 32]."""

    scales: ClassVar[torch.dtype] = torch.uint8
    region: ClassVar[tuple[int, int]] = (1, 32)


@dataclass(frozen=True, kw_only=True)
class NvScale(Regional):
    """NVFP4: an e4m3 scale for each 16 elements of a row, under one fp32 scale for the group.

    `dst` holds two codes a byte, the even column in the low half, and has half the columns of
    `src`. NaN, which e2m1 lacks, becomes ±6 by its sign, as Inf does.

    Attributes:
        second_scale: fp32 [1], written: amax / (448 · 6) of all moves that share `amax`.
        amax: fp32 [1], scratch; the group's.
    """

    codes: ClassVar[torch.dtype] = E2M1_PAIRS
    scales: ClassVar[torch.dtype] = E4M3
    region: ClassVar[tuple[int, int]] = (1, 16)
    second_scale: torch.Tensor
    amax: torch.Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("second_scale", self.second_scale)
        _check_number("amax", self.amax)


Scheme = GivenScale | TensorScale | RowScale | BlockScale | MxScale | NvScale


def placed(quant: Scheme | None, place: Callable[[torch.Tensor], torch.Tensor]) -> Scheme | None:
    """A scheme with its tensors replaced by what `place` gives for each; a given scale stays."""
    if quant is None or isinstance(quant, GivenScale):
        return quant
    changes: dict[str, Any] = {}
    for one in fields(quant):
        value = getattr(quant, one.name)
        if isinstance(value, torch.Tensor):
            changes[one.name] = place(value)
    return replace(quant, **changes)
