"""All moves of a batch in one launch per kind.

Each move becomes a few rows of a descriptor table; a second table maps every tile to its row, so
a program finds its work with two loads and no search. A kind is what the compiled code depends
on: order of the strides, dtypes, whether accesses can be 16 bytes wide, and the arithmetic. A
model usually needs two or three kinds, however many tensors it has.

Bytes moved: every source and destination byte once, plus 4 bytes of tile table per 4096 elements
(8192 when transposed) and 128 bytes per descriptor.

Rejected: tiles of 2048 elements (on an H100 0.73 of the copy into e4m3, where 4096 gave 1.0: the
two table loads are then too large a share of a program), and tiles above 4096 (no gain).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from .move import Box, Move, describe, is_vector, tile_counts, tile_shape
from .move_kernel import move_kernel
from .numerics import LARGEST_SOURCE

_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


@dataclass(frozen=True)
class Kind:
    """What the compiled code depends on; moves of one kind share a launch."""

    src: torch.dtype
    dst: torch.dtype
    order: str
    vector: bool
    bit_copy: bool
    shift: bool
    scale: bool


@dataclass(frozen=True)
class Launch:
    """One kind's tables on the device, ready to run any number of times."""

    kind: Kind
    descriptors: torch.Tensor
    tile_table: torch.Tensor

    @property
    def tiles(self) -> int:
        """Number of programs."""
        return self.tile_table.numel()


def _row(move: Move, box: Box, scale_pointer: int, index: int) -> list[int]:
    """A descriptor: pointers, sizes and strides in elements, tile counts, shift, scale, counter.

    Field 10, the first tile, is filled when the launch's rows are known.
    """
    dst = move.dst.data_ptr() + box.dst_offset * move.dst.element_size()
    src = move.src.data_ptr() + box.src_offset * move.src.element_size()
    _, row_tiles, col_tiles = tile_counts(box)
    shift = struct.unpack("<i", struct.pack("<f", move.shift))[0]
    return [
        dst, src, box.rows.size, box.cols.size, box.outer.dst, box.outer.src,
        box.rows.dst, box.rows.src, box.cols.dst, box.cols.src,
        0, row_tiles, col_tiles, shift, scale_pointer, index,
    ]  # fmt: skip


def _kind(move: Move, box: Box, row: list[int]) -> Kind:
    return Kind(
        move.src.dtype, move.dst.dtype, box.order, is_vector(box, row[0], row[1]),
        move.is_bit_copy, move.shift != 0.0, move.quant is not None,
    )  # fmt: skip


def constants(kind: Kind, count: bool, native: bool) -> dict[str, object]:
    """The kernel's constexpr arguments for one kind."""
    rows, cols = tile_shape(kind.order)
    floating = kind.src in (torch.float32, torch.bfloat16, torch.float16)
    unsigned = _UNSIGNED[kind.src.itemsize]
    largest = LARGEST_SOURCE.get(kind.dst, 0.0)
    return {
        "SRC": _TRITON[kind.src] if floating else unsigned,
        "DST": _TRITON.get(kind.dst, unsigned),
        "DST_BITS": _UNSIGNED[kind.dst.itemsize],
        "ORDER": kind.order,
        "VECTOR": kind.vector,
        "BIT_COPY": kind.bit_copy,
        "SHIFT": kind.shift,
        "SCALE": kind.scale,
        "COUNT": count and floating,
        "LARGEST": largest,
        "LARGEST_BITS": int(np.float32(largest).view(np.int32)),
        "NATIVE": native,
        "ROWS": rows,
        "COLS": cols,
    }


def warps(kind: Kind, count: bool) -> int:
    """Warps of a program; counting in the large transposed tile would spill with fewer."""
    return 8 if count and kind.order == "transposed" else 4


def has_native_e4m3(device: torch.device) -> bool:
    """True where the hardware's fp32 → e4m3 conversion rounds once: NVIDIA sm_90 and later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


class FusedCopy:
    """A batch of moves with its tables built: `run` launches, and may be called again.

    The tables hold addresses, so the moves' storages must stay where they are; the moves are
    kept alive. `run` does no host synchronisation and can be captured in a CUDA graph.

    Args:
        moves: any number of moves, all on one device. Destinations must not overlap one another
            or any source.
        native_e4m3: force the hardware or the integer route to e4m3; by default what
            `has_native_e4m3` says.

    Raises:
        ValueError: the moves lie on several devices.
    """

    def __init__(self, moves: Sequence[Move], *, native_e4m3: bool | None = None) -> None:
        self.moves = tuple(moves)
        self.device = _one_device(self.moves)
        self._native = has_native_e4m3(self.device) if native_e4m3 is None else native_e4m3
        self._scales = _scale_values(self.moves, self.device)
        self.launches = tuple(self._build())

    def _build(self) -> list[Launch]:
        rows: dict[Kind, list[list[int]]] = defaultdict(list)
        tiles: dict[Kind, list[int]] = defaultdict(list)
        pointers = _scale_pointers(self.moves, self._scales)
        for index, move in enumerate(self.moves):
            for box in describe(move.dst, move.src):
                row = _row(move, box, pointers[index], index)
                kind = _kind(move, box, row)
                rows[kind].append(row)
                outer, row_tiles, col_tiles = tile_counts(box)
                tiles[kind].append(outer * row_tiles * col_tiles)
        return [_launch(kind, rows[kind], tiles[kind], self.device) for kind in rows]

    def run(self, *, count: bool = False) -> torch.Tensor | None:
        """Launch every kind once, on the current stream.

        Returns:
            With `count`, int64 [len(moves), 2] on the device: per move, the finite source
            elements that saturated or overflowed, and those that are NaN or Inf.
        """
        shape = (len(self.moves), 2) if count else (1, 2)
        counters = torch.zeros(shape, dtype=torch.int64, device=self.device) if count else None
        for launch in self.launches:
            # Without counting the pointer is never read: any tensor of its type will do.
            counter = launch.descriptors if counters is None else counters
            fixed = constants(launch.kind, count, self._native)
            with _on(self.device):
                move_kernel[(launch.tiles,)](
                    launch.descriptors, launch.tile_table, counter, **fixed,
                    num_warps=warps(launch.kind, count), enable_fp_fusion=False,
                )  # fmt: skip
        return counters


def fused_copy(moves: Sequence[Move], *, count: bool = False) -> torch.Tensor | None:
    """Run `moves` on their GPU (or in Triton's interpreter), one launch per kind.

    Twin of `reference.fused_copy_ref`: same arguments, same bits, same counters.
    """
    if not moves:
        return torch.zeros(0, 2, dtype=torch.int64) if count else None
    return FusedCopy(moves).run(count=count)


def _one_device(moves: Sequence[Move]) -> torch.device:
    devices = {tensor.device for move in moves for tensor in (move.dst, move.src)}
    if len(devices) != 1:
        found = sorted(map(str, devices))
        raise ValueError(f"the moves of a batch must lie on one device, found {found}")
    return devices.pop()


def _scale_values(moves: Sequence[Move], device: torch.device) -> torch.Tensor:
    """fp32 [len(moves)]: scales given as floats, in one upload; 1.0 where there is none."""
    given = (move.quant.quant_scale if move.quant else 1.0 for move in moves)
    values = [1.0 if isinstance(value, torch.Tensor) else value for value in given]
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def _scale_pointers(moves: Sequence[Move], values: torch.Tensor) -> list[int]:
    """Where the kernel finds each move's scale: the caller's tensor, or the uploaded value."""
    base = values.data_ptr()
    pointers = []
    for index, move in enumerate(moves):
        scale = move.quant.quant_scale if move.quant else None
        own = isinstance(scale, torch.Tensor)
        pointers.append(scale.data_ptr() if own else base + 4 * index)  # type: ignore[union-attr]
    return pointers


def _launch(kind: Kind, rows: list[list[int]], tiles: list[int], device: torch.device) -> Launch:
    table = np.array(rows, dtype=np.int64)
    counts = np.array(tiles, dtype=np.int64)
    table[:, 10] = np.cumsum(counts) - counts
    descriptors = torch.from_numpy(table).to(device)
    # The tile table is the larger one, so it is expanded where it is used.
    tile_table = torch.repeat_interleave(
        torch.arange(len(rows), dtype=torch.int32, device=device),
        torch.from_numpy(counts).to(device),
        output_size=int(counts.sum()),
    )
    return Launch(kind, descriptors, tile_table)


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def is_interpreted() -> bool:
    """True if the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when imported)."""
    return not isinstance(move_kernel, triton.runtime.JITFunction)
