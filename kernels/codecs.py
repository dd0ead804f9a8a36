"""What the codes of the narrow formats mean, in plain torch, for weights stored so.

Each decoder is exact: it puts a code's bits where fp32 has them and multiplies by a power of two,
which no rounding touches. A table of values would do as well for one code, but indexing with it
takes eight bytes of index for each element of a weight.

Sources: OCP 8-bit Floating Point Specification 1.0 (e4m3), OCP Microscaling Formats 1.0
(e8m0, e2m1). All results are fp32. A dequant_scale multiplies after decoding; axes are o output
rows and i input columns.
"""

from __future__ import annotations

import torch

BLOCK = 128
MX_COLUMNS = 32
NV_COLUMNS = 16

# From a format's exponent to fp32's: 2^(127 - bias). Bias 7 for e4m3, 1 for e2m1.
_E4M3_REBIAS = 2.0**120
_E2M1_REBIAS = 2.0**126


def _wide(codes: torch.Tensor) -> torch.Tensor:
    """One-byte codes as int32, whatever type they are seen as."""
    if codes.element_size() != 1:
        raise ValueError(f"codes take one byte each, but these are {codes.dtype}")
    return codes.view(torch.uint8).to(torch.int32)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 (`fn`: no infinities, NaN at 0x7F and 0xFF), as uint8 or float8_e4m3fn."""
    wide = _wide(codes)
    bits = (wide >> 7 << 31) | ((wide & 0x7F) << 20)
    value = bits.view(torch.float32) * _E4M3_REBIAS
    return value.masked_fill((wide & 0x7F) == 0x7F, float("nan"))


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """e8m0 = 2^(code - 127), as uint8 or float8_e8m0fnu; 0 is 2^-127 (subnormal), 255 NaN."""
    wide = _wide(codes)
    bits = torch.where(wide == 0, 1 << 22, wide << 23)
    return bits.to(torch.int32).view(torch.float32).masked_fill(wide == 0xFF, float("nan"))


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """e2m1, one code (0 to 15) in each uint8: ±0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    wide = _wide(codes)
    bits = (wide >> 3 << 31) | ((wide & 7) << 22)
    return bits.view(torch.float32) * _E2M1_REBIAS


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n/2] → e2m1 codes, uint8 [..., n]; the low four bits come first."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def _check(what: str, found: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(found.shape) != expected:
        raise ValueError(f"{what} have shape {list(found.shape)}, expected {list(expected)}")


def _blocks_of(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantise_tensor(codes: torch.Tensor, dequant_scale: float | torch.Tensor) -> torch.Tensor:
    """One fp32 dequant_scale for all e4m3 codes, of any shape."""
    scale = torch.as_tensor(dequant_scale, dtype=torch.float32, device=codes.device)
    return decode_e4m3(codes) * scale.reshape(())


def dequantise_rows(codes: torch.Tensor, dequant_scales: torch.Tensor) -> torch.Tensor:
    """e4m3 codes [o, i], fp32 dequant_scales [o] (or [o, 1]).

    Raises:
        ValueError: the shapes do not fit.
    """
    scales = dequant_scales.reshape(-1)
    _check("scales of rows", scales, (codes.shape[0],))
    return decode_e4m3(codes) * scales[:, None]


def dequantise_blocks(codes: torch.Tensor, dequant_scales: torch.Tensor) -> torch.Tensor:
    """e4m3 codes [o, i], fp32 dequant_scales [ceil(o/128), ceil(i/128)].

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, columns = codes.shape
    _check("scales of 128×128 blocks", dequant_scales, _blocks_of(rows, columns))
    wide = dequant_scales.repeat_interleave(BLOCK, 0)[:rows]
    return decode_e4m3(codes) * wide.repeat_interleave(BLOCK, 1)[:, :columns]


def dequantise_mx(codes: torch.Tensor, dequant_scales: torch.Tensor) -> torch.Tensor:
    """MXFP8: e4m3 codes [o, i], e8m0 dequant_scales [o, i/32] as uint8 or float8_e8m0fnu.

    Raises:
        ValueError: the shapes do not fit.
    """
    return _by_groups(decode_e4m3(codes), decode_e8m0(dequant_scales), MX_COLUMNS)


def dequantise_nvfp4(
    packed: torch.Tensor, dequant_scales: torch.Tensor, dequant_scale_2: float | torch.Tensor
) -> torch.Tensor:
    """NVFP4: packed e2m1 [o, i/2], e4m3 dequant_scales [o, i/16], one fp32 dequant_scale_2.

    A group's two scales are multiplied first, in fp32, and then each value by their product.

    Raises:
        ValueError: the shapes do not fit.
    """
    values = decode_e2m1(unpack_e2m1(packed))
    return _by_groups(values, dequantise_tensor(dequant_scales, dequant_scale_2), NV_COLUMNS)


def _by_groups(values: torch.Tensor, dequant_scales: torch.Tensor, size: int) -> torch.Tensor:
    """[o, i] times [o, i/size], each scale for `size` neighbours of a row."""
    rows, columns = values.shape
    if columns % size:
        raise ValueError(f"{columns} columns are no whole number of groups of {size}")
    _check(f"scales of groups of {size}", dequant_scales, (rows, columns // size))
    return values * dequant_scales.repeat_interleave(size, 1)
