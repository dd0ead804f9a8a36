"""A source's quantised weight: e4m3 codes and their scales, which become fp32 when they are read.

Everything behind a source then sees a weight as any other. A target that has the same scheme takes
codes and scales as they are instead (`stored_codes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from fuseport.kernels.codecs import (
    decode_e8m0,
    dequantise_blocks,
    dequantise_mx,
    dequantise_rows,
    dequantise_tensor,
)

from ..errors import ScaleError
from .stored import Shape, Stored


@dataclass(frozen=True)
class Packing:
    """How codes and scales go together.

    `quant` is the scheme as `Recipe.quant` calls it. A scale is for `region` rows and columns of
    [o, i]; 0 is all of them.
    """

    quant: str
    region: tuple[int, int]
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def grid(self, rows: int, columns: int) -> Shape:
        """How many scales a weight [rows, columns] has, down and across."""
        down, across = self.region
        return (-(-rows // down) if down else 1), (-(-columns // across) if across else 1)


PACKINGS = {
    one.quant: one
    for one in (
        Packing("fp8", (0, 0), dequantise_tensor),
        Packing("fp8-row", (1, 0), dequantise_rows),
        Packing("fp8-block", (128, 128), dequantise_blocks),
        Packing("mxfp8", (1, 32), dequantise_mx),
    )
}


@dataclass(frozen=True)
class Scales(Stored):
    """Dequant_scales, each of which must be a number to multiply by."""

    def read_flat(self, start: int, stop: int, out: torch.Tensor) -> None:
        """As of any stored tensor.

        Raises:
            ScaleError: one is zero, negative, infinite or NaN.
        """
        super().read_flat(start, stop, out)
        values = decode_e8m0(out) if out.dtype is torch.uint8 else out.float()
        bad = (~(torch.isfinite(values) & (values > 0))).nonzero()
        if len(bad):
            first = int(bad[0])
            raise ScaleError(
                f"{self.name}: scale number {start + first} is {float(values[first])}, expected "
                f"finite and positive; quantise the checkpoint again"
            )


@dataclass(frozen=True, kw_only=True)
class Dequantised(Stored):
    """`code · dequant_scale` in fp32, [o, i]; has no pieces of its own.

    Attributes:
        codes: e4m3 [o, i].
        scales: fp32, bf16 or fp16, or uint8 (E8M0), of the packing's grid.
    """

    codes: Stored
    scales: Scales
    packing: Packing

    @property
    def nbytes(self) -> int:
        """Size as stored, in bytes."""
        return self.codes.nbytes + self.scales.nbytes

    def read_flat(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Reads whole rows of scales, and of the codes that they are for."""
        self._check(start, stop, out)
        if start == stop:
            return
        rows, columns = self.shape
        height = self.packing.region[0] or rows
        top, bottom = start // columns // height, -(-stop // (columns * height))
        first, last = top * height, min(bottom * height, rows)
        across = self.packing.grid(rows, columns)[1]
        codes = read_part(self.codes, first * columns, last * columns).view(-1, columns)
        scales = read_part(self.scales, top * across, bottom * across).view(-1, across)
        if scales.dtype is not torch.uint8:
            scales = scales.float()
        elif self.packing.quant != "mxfp8":
            scales = decode_e8m0(scales)
        flat = self.packing.decode(codes, scales).view(-1)
        out.copy_(flat[start - first * columns : stop - first * columns])


def dequantised(name: str, codes: Stored, scales: Stored, packing: Packing) -> Dequantised:
    """A weight of codes [o, i] and their scales, of the packing's grid."""
    checked = Scales(**{one.name: getattr(scales, one.name) for one in fields(Stored)})
    return Dequantised(
        name, codes.shape, torch.float32, (), codes=codes, scales=checked, packing=packing
    )


def read_whole(stored: Stored) -> torch.Tensor:
    """All of a stored tensor, in memory."""
    return read_part(stored, 0, stored.numel).view(stored.shape)


def read_part(stored: Stored, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a stored tensor, flattened, in memory."""
    out = torch.empty(stop - start, dtype=stored.dtype, device="cpu")
    stored.read_flat(start, stop, out)
    return out
