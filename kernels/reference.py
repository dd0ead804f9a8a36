"""Torch twins of the kernels: the same arguments, the same bits, no shared code.

Also the backend on machines without a GPU. Works on any device and needs no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .move import Move

# (largest finite magnitude to clamp at, bits of the NaN, integer dtype of the same width)
_FORMATS: dict[torch.dtype, tuple[float | None, int, torch.dtype]] = {
    torch.float32: (None, 0x7FC00000, torch.int32),
    torch.bfloat16: (None, 0x7FC0, torch.int16),
    torch.float16: (None, 0x7E00, torch.int16),
    torch.float8_e4m3fn: (448.0, 0x7F, torch.uint8),
}
# Elements handled at once: bounds the fp32 temporaries to a few tens of MiB.
_CHUNK = 1 << 22


def downcast_ref(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `values` rounded once into `dtype`; e4m3 saturates; NaN takes the format's bits."""
    limit, nan_bits, integer = _FORMATS[dtype]
    bounded = values if limit is None else values.clamp(-limit, limit)
    rounded = bounded.to(dtype).contiguous().view(integer)
    return rounded.masked_fill(torch.isnan(values), nan_bits).view(dtype)


def _values(move: Move) -> torch.Tensor:
    values = move.src.to(torch.float32)
    if move.shift != 0.0:
        values = values + move.shift
    if move.quant is not None:
        values = values * torch.as_tensor(
            move.quant.quant_scale, dtype=torch.float32, device=values.device
        ).reshape(())
    return values


def _chunks(move: Move) -> Iterator[Move]:
    """The move in parts of at most `_CHUNK` elements, cut along its longest dimension."""
    if move.dst.numel() <= _CHUNK:
        yield move
        return
    axis = max(range(move.dst.ndim), key=lambda dim: move.dst.shape[dim])
    half = move.dst.shape[axis] // 2
    for start, length in ((0, half), (half, move.dst.shape[axis] - half)):
        dst = move.dst.narrow(axis, start, length)
        src = move.src.narrow(axis, start, length)
        yield from _chunks(Move(dst, src, move.shift, move.quant))


def _run(move: Move) -> None:
    if move.is_bit_copy:
        move.dst.copy_(move.src)
    else:
        move.dst.copy_(downcast_ref(_values(move), move.dst.dtype))


def _count(move: Move) -> torch.Tensor:
    """int64 [2]: finite sources beyond the destination's range; NaN and Inf sources."""
    if not move.src.is_floating_point() or move.src.dtype.itemsize == 1:
        return torch.zeros(2, dtype=torch.int64, device=move.src.device)
    finite = torch.isfinite(move.src)
    values = _values(move)
    if move.dst.dtype is torch.float8_e4m3fn:
        beyond = values.abs() > 448.0
    else:
        beyond = torch.isinf(values.to(move.dst.dtype))
    return torch.stack([(beyond & finite).sum(), (~finite).sum()])


@torch.no_grad()
def fused_copy_ref(moves: Sequence[Move], *, count: bool = False) -> torch.Tensor | None:
    """Run `moves` one after the other in plain torch.

    Returns:
        With `count`, int64 [len(moves), 2] on the moves' device: per move, the finite source
        elements that saturated or overflowed, and the source elements that are NaN or Inf.
    """
    counts = []
    for move in moves:
        total = torch.zeros(2, dtype=torch.int64, device=move.dst.device)
        for part in _chunks(move):
            _run(part)
            if count:
                total += _count(part)
        counts.append(total)
    if not count:
        return None
    return torch.stack(counts) if counts else torch.zeros(0, 2, dtype=torch.int64)
