"""Torch twins of the kernels: the same arguments, the same bits, no shared code.

Also the backend on machines without a GPU. Works on any device and needs no Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from .move import Move
from .quant import GivenScale, NvScale, Regional, TensorScale
from .quant_reference import (
    dequant_scale_ref,
    dequantise_ref,
    encode_e4m3,
    quantise_ref,
    update_amax,
)

# (bits of the NaN, integer dtype of the same width)
_FORMATS: dict[torch.dtype, tuple[int, torch.dtype]] = {
    torch.float32: (0x7FC00000, torch.int32),
    torch.bfloat16: (0x7FC0, torch.int16),
    torch.float16: (0x7E00, torch.int16),
}
# Elements handled at once: bounds the fp32 temporaries to a few tens of MiB.
_CHUNK = 1 << 22


def downcast_ref(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `values` rounded once into `dtype`; e4m3 saturates; NaN takes the format's bits."""
    if dtype is torch.float8_e4m3fn:
        return encode_e4m3(values)
    nan_bits, integer = _FORMATS[dtype]
    rounded = values.to(dtype).contiguous().view(integer)
    return rounded.masked_fill(torch.isnan(values), nan_bits).view(dtype)


def _values(move: Move) -> torch.Tensor:
    values = move.src.to(torch.float32)
    return values + move.shift if move.shift != 0.0 else values


def _parts(move: Move) -> Iterator[Move]:
    """The move in parts of about `_CHUNK` elements, cut along its first axis."""
    if move.src.ndim == 0 or move.src.numel() <= _CHUNK:
        yield move
        return
    count = move.src.shape[0]
    step = max(1, count * _CHUNK // move.src.numel())
    for first in range(0, count, step):
        length = min(step, count - first)
        quant = move.quant
        if isinstance(quant, Regional):
            done = first * (move.src.numel() // count) // quant.columns
            quant = dataclasses.replace(quant, first_row=quant.first_row + done)
        dst, src = move.dst.narrow(0, first, length), move.src.narrow(0, first, length)
        yield Move(dst, src, move.shift, quant)


# A move's values, those as they were scaled, and the largest that does not saturate, if any does.
Outcome = tuple[torch.Tensor, torch.Tensor, float | None]


def _run(move: Move, amaxes: dict[int, torch.Tensor]) -> Outcome:
    """Fill `dst`; what `_lost` takes."""
    if move.is_bit_copy:
        move.dst.copy_(move.src)
        return move.src, move.src, None
    values = _values(move)
    if isinstance(move.quant, Regional):
        codes, scaled = quantise_ref(values, move.quant, amaxes)
        move.dst.copy_(codes.view(move.dst.shape))
        return values, scaled.view(values.shape), 7.0 if codes.dtype is torch.uint8 else 464.0
    scaled = _scaled(values, move)
    move.dst.copy_(downcast_ref(scaled, move.dst.dtype))
    if move.dst.dtype is torch.float8_e4m3fn:
        return values, scaled, 464.0
    return values, scaled.to(move.dst.dtype), None


def _scaled(values: torch.Tensor, move: Move) -> torch.Tensor:
    if isinstance(move.quant, GivenScale):
        scale = torch.as_tensor(move.quant.quant_scale, dtype=torch.float32, device=values.device)
        return values * scale.reshape(())
    if isinstance(move.quant, TensorScale):
        scale = dequant_scale_ref(move.quant.amax, 448.0)
        move.quant.dequant_scale.copy_(scale)
        return values / scale.reshape(())
    return values


def _lost(values: torch.Tensor, scaled: torch.Tensor, largest: float | None) -> torch.Tensor:
    """int64 [2]: finite values that don't fit the destination; NaN and Inf values."""
    if not values.is_floating_point() or values.dtype.itemsize == 1:
        return torch.zeros(2, dtype=torch.int64, device=values.device)
    finite = torch.isfinite(values)
    beyond = torch.isinf(scaled) if largest is None else scaled.abs() > largest
    return torch.stack([(beyond & finite).sum(), (~finite).sum()])


def _error(move: Move, amaxes: dict[int, torch.Tensor]) -> torch.Tensor:
    """fp64 [2]: Σx² and Σ(x − dequantised)² over the finite elements of a quantised move."""
    values = _values(move).double()
    back = dequantise_ref(move, amaxes).double().reshape(values.shape)
    finite = torch.isfinite(values)
    differences = torch.where(finite, values - back, 0.0)
    return torch.stack(
        [torch.where(finite, values, 0.0).square().sum(), differences.square().sum()]
    )


def _find_amaxes(
    moves: Sequence[Move], reduce: Callable[[tuple[torch.Tensor, ...]], object] | None
) -> dict[int, torch.Tensor]:
    """Fill the groups' amaxes; the matrices' own, by the address of their scales."""
    groups: dict[int, torch.Tensor] = {}
    for move in moves:
        if isinstance(move.quant, (TensorScale, NvScale)):
            groups.setdefault(move.quant.amax.data_ptr(), move.quant.amax).zero_()
    matrices: dict[int, torch.Tensor] = {}
    for move in moves:
        if move.quant is not None and not isinstance(move.quant, GivenScale):
            for part in _parts(move):
                update_amax(_values(part), part.quant, matrices)
    if reduce is not None and groups:
        reduce(tuple(groups.values()))
    return matrices


@torch.no_grad()
def fused_copy_ref(
    moves: Sequence[Move],
    *,
    count: bool = False,
    power: torch.Tensor | None = None,
    reduce: Callable[[tuple[torch.Tensor, ...]], object] | None = None,
) -> torch.Tensor | None:
    """Run `moves` one after the other in plain torch.

    `count`, `power` and `reduce` are as for `FusedCopy.run`.

    Returns:
        With `count`, int64 [len(moves), 2] on the moves' device: per move, the finite source
        elements that saturated or overflowed, and the source elements that are NaN or Inf.
    """
    moves = tuple(moves)
    amaxes = _find_amaxes(moves, reduce)
    counts = []
    for index, move in enumerate(moves):
        total = torch.zeros(2, dtype=torch.int64, device=move.dst.device)
        for part in _parts(move):
            outcome = _run(part, amaxes)
            if count:
                total += _lost(*outcome)
            if power is not None and part.quant is not None:
                power[index] += _error(part, amaxes)
        counts.append(total)
    if not count:
        return None
    nothing = torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    return torch.stack(counts) if counts else nothing
