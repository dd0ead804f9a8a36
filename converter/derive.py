"""Tensors of a plan by way of whole tensors in memory: what the engine's results are compared with.

It shares no cutting and no streaming with the engine, so that a mistake there shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fuseport.kernels.move import Move

from .backend import Run
from .plan import Planned, bind, intervals, storage_key
from .quantise import on_real
from .sources.stored import Stored

# Bytes of target tensors derived at once.
BATCH = 256 << 20


def derive(
    batch: list[Planned], stored: Mapping[int, Stored], run: Run, device: torch.device
) -> list[torch.Tensor]:
    """Read what a batch of planned tensors needs, and fill them on `device`."""
    memory = _load((move.src for one in batch for move in one.moves), stored, device)
    results = [torch.empty_like(planned.dst, device=device) for planned in batch]
    # Where scales land: in tensors of the batch, or (an amax) in scratch memory.
    real = {storage_key(one.dst): dst for one, dst in zip(batch, results, strict=True)}

    def place(view: torch.Tensor) -> torch.Tensor:
        if storage_key(view) not in real:
            real[storage_key(view)] = torch.empty_like(view, device=device)
        return bind(view, real[storage_key(view)].view(-1), 0)

    moves = [
        [_bound(move, dst, memory, place) for move in planned.moves]
        for planned, dst in zip(batch, results, strict=True)
    ]
    run([move for group in moves for move in group])
    return results


Memory = dict[int, list[tuple[int, torch.Tensor]]]


def _load(
    views: Iterable[torch.Tensor], stored: Mapping[int, Stored], device: torch.device
) -> Memory:
    """For each storage, its needed ranges: (first element, 1-D tensor on the device)."""
    memory: Memory = {}
    for key, spans in intervals(views).items():
        for span in spans:
            host = torch.empty(span.stop - span.start, dtype=stored[key].dtype)
            stored[key].read_flat(span.start, span.stop, host)
            memory.setdefault(key, []).append((span.start, host.to(device)))
    return memory


def _bound(
    move: Move,
    dst: torch.Tensor,
    memory: Memory,
    place: Callable[[torch.Tensor], torch.Tensor],
) -> Move:
    target = bind(move.dst, dst.view(-1), 0)
    if not move.src.numel():
        return Move(target, target, 0.0)
    offset = move.src.storage_offset()
    first, flat = max(
        (one for one in memory[storage_key(move.src)] if one[0] <= offset), key=lambda one: one[0]
    )
    return Move(target, bind(move.src, flat, first), move.shift, on_real(move.quant, place))
