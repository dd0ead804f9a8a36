"""The quantisation schemes in plain torch, written from their definitions: see `quant`."""

from __future__ import annotations

import torch

from .move import Move
from .quant import GivenScale, MxScale, NvScale, Regional, RowScale, Scheme, TensorScale

_SMALLEST = 2.0**-90
# Halfway between e2m1's magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
_TIES_DOWN, _TIES_UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """e4m3 of fp32 values: nearest even, saturating at 448, NaN → 0x7F."""
    rounded = values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).contiguous()
    bits = rounded.view(torch.uint8).masked_fill(torch.isnan(values), 0x7F)
    return bits.view(torch.float8_e4m3fn)


def encode_e2m1(values: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """e2m1 codes (uint8, 0 to 15) of fp32 values: nearest even, saturating at 6, NaN as Inf.

    The signs are apart, since a division may lose a NaN's.
    """
    magnitude = values.abs().nan_to_num(nan=torch.inf)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for tie in _TIES_DOWN:
        codes += magnitude > tie
    for tie in _TIES_UP:
        codes += magnitude >= tie
    codes += 8 * torch.signbit(signs).to(torch.uint8)
    return codes


def dequant_scale_ref(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Amax / largest, fp32, at least 2⁻⁹⁰; 1.0 where the amax is 0."""
    return torch.where(amax == 0, 1.0, _divide(amax, largest).clamp(min=_SMALLEST))


def _divide(values: torch.Tensor, by: float) -> torch.Tensor:
    # By a tensor: on a GPU torch multiplies with the reciprocal of a plain number.
    return values / torch.full((), by, dtype=torch.float32, device=values.device)


def update_amax(
    values: torch.Tensor, quant: Scheme | None, matrices: dict[int, torch.Tensor]
) -> None:
    """Merge a part's largest finite magnitudes into its group's and its matrix's amax."""
    magnitudes = torch.where(torch.isfinite(values), values.abs(), 0.0)
    if magnitudes.numel() and isinstance(quant, (TensorScale, NvScale)):
        quant.amax.copy_(torch.maximum(quant.amax, magnitudes.max()))
    if isinstance(quant, Regional):
        grid = _grid(quant, matrices)
        rows, columns = _regions(quant, magnitudes.numel() // quant.columns)
        index = (rows[:, None] * grid.shape[1] + columns[None, :]).reshape(-1)
        grid.view(-1).scatter_reduce_(0, index, magnitudes.reshape(-1), "amax")


def _grid(quant: Regional, matrices: dict[int, torch.Tensor]) -> torch.Tensor:
    """The amax of each region of a matrix, [regions down, regions across]."""
    scales = quant.dequant_scale
    shape = (scales.shape[0], scales.shape[1] if scales.ndim > 1 else 1)
    grid = torch.zeros(shape, dtype=torch.float32, device=scales.device)
    return matrices.setdefault(scales.data_ptr(), grid)


def _regions(quant: Regional, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the move's rows, and for each column, the number of its region."""
    height, width = quant.region
    device = quant.dequant_scale.device
    rows = torch.arange(quant.first_row, quant.first_row + count, device=device) // height
    columns = torch.arange(quant.columns, device=device) // (width or quant.columns)
    return rows, columns


def quantise_ref(
    values: torch.Tensor, quant: Regional, matrices: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns (or half of them)] of a part, and its values as they were scaled."""
    flat = values.reshape(-1, quant.columns)
    scale = _element_scale(quant, flat.shape[0], matrices)
    scaled = flat / scale
    if not isinstance(quant, NvScale):
        return encode_e4m3(scaled), scaled
    codes = encode_e2m1(scaled, flat)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scaled


def _element_scale(quant: Regional, count: int, matrices: dict[int, torch.Tensor]) -> torch.Tensor:
    """[rows, columns]: what each element is divided by. Writes the scales of its regions."""
    rows, columns = _regions(quant, count)
    touched = rows.unique()
    amax = _grid(quant, matrices)[touched]
    if isinstance(quant, MxScale):
        stored = _e8m0(amax)
        wide = torch.pow(2.0, stored.double() - 127).float()
    elif isinstance(quant, NvScale):
        second = dequant_scale_ref(quant.amax, 2688.0)
        quant.second_scale.copy_(second)
        # Never zero: a block too small for e4m3 gets its smallest scale, 2⁻⁹.
        positive = (_divide(amax, 6.0) / second).clamp(min=2.0**-9)
        stored = encode_e4m3(torch.where(amax == 0, 1.0, positive))
        wide = stored.float() * second
    else:
        stored = wide = dequant_scale_ref(amax, 448.0)
    target = quant.dequant_scale.view(torch.uint8 if stored.dtype.itemsize == 1 else torch.float32)
    bits = stored.view(target.dtype)
    target[touched] = bits.squeeze(1) if isinstance(quant, RowScale) else bits
    return wide[torch.searchsorted(touched, rows)][:, columns]


def _e8m0(amax: torch.Tensor) -> torch.Tensor:
    """uint8: the exponent of the amax, rounded down, less 8; 127 (2⁰) where the amax is 0."""
    exponent = torch.frexp(amax).exponent.to(torch.int32) - 1 - 8
    code = exponent.clamp(-127, 127) + 127
    return torch.where(amax == 0, 127, code).to(torch.uint8)


def dequantise_ref(move: Move, matrices: dict[int, torch.Tensor]) -> torch.Tensor:
    """fp32: what a quantised move's codes stand for."""
    quant = move.quant
    if isinstance(quant, GivenScale):
        scale = torch.as_tensor(quant.quant_scale, dtype=torch.float32, device=move.dst.device)
        return move.dst.float() / scale.reshape(())
    if isinstance(quant, TensorScale):
        return move.dst.float() * quant.dequant_scale.reshape(())
    assert isinstance(quant, Regional)
    scale = _element_scale(quant, move.src.numel() // quant.columns, matrices)
    if not isinstance(quant, NvScale):
        return move.dst.float().reshape(-1, quant.columns) * scale
    pairs = torch.stack([move.dst & 15, move.dst >> 4], -1).reshape(-1, quant.columns)
    values = _E2M1 + tuple(-one for one in _E2M1)
    table = torch.tensor(values, dtype=torch.float32, device=move.dst.device)
    return table[pairs.long()] * scale
