"""Matrices with each scheme of computed scales: poisoned outputs, and the moves that fill them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import BlockScale, MxScale, NvScale, RowScale, Scheme, TensorScale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
NAMES = ["tensor", "row", "block", "mx", "nv"]


def poisoned(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """0xA5 in every byte: no kernel writes that by chance everywhere."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), 0xA5, dtype=torch.uint8, device=DEVICE).view(dtype).view(shape)


class Matrix:
    """Poisoned codes and scales of one matrix, and the moves that fill it."""

    def __init__(self, name: str, rows: int, columns: int, group: torch.Tensor | None = None):
        self.name, self.columns = name, columns
        packed = name == "nv"
        self.codes = poisoned(rows, columns // 2 if packed else columns)
        self.codes = self.codes if packed else self.codes.view(E4M3)
        # Larger than any amax: one that is not cleared shows.
        self.amax = torch.full((1,), 3e38, device=DEVICE) if group is None else group
        self.second = poisoned(1, dtype=torch.float32)
        self.scales = {
            "tensor": lambda: poisoned(1, dtype=torch.float32),
            "row": lambda: poisoned(rows, dtype=torch.float32),
            "block": lambda: poisoned(-(-rows // 128), -(-columns // 128), dtype=torch.float32),
            "mx": lambda: poisoned(rows, columns // 32),
            "nv": lambda: poisoned(rows, columns // 16).view(E4M3),
        }[name]()

    def quant(self, first_row: int) -> Scheme:
        schemes: dict[str, Callable[[], Scheme]] = {
            "tensor": lambda: TensorScale(self.scales, self.amax),
            "row": lambda: RowScale(self.scales, self.columns, first_row),
            "block": lambda: BlockScale(self.scales, self.columns, first_row),
            "mx": lambda: MxScale(self.scales, self.columns, first_row),
            "nv": lambda: NvScale(
                self.scales, self.columns, first_row,
                second_scale=self.second, amax=self.amax,
            ),
        }  # fmt: skip
        return schemes[self.name]()

    def moves(self, sources: Sequence[torch.Tensor]) -> list[Move]:
        """The sources, one below the other."""
        moves, first = [], 0
        for source in sources:
            rows = source.numel() // self.columns
            shape = list(source.shape)
            if self.name == "nv":
                shape[-1] //= 2
            dst = self.codes[first : first + rows].view(shape)
            moves.append(Move(dst, source, 0.0, self.quant(first)))
            first += rows
        return moves

    def bits(self) -> list[torch.Tensor]:
        written = [self.codes, self.scales, *([self.second] if self.name == "nv" else [])]
        return [tensor.view(torch.uint8) for tensor in written]


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 4.0) -> torch.Tensor:
    """Normal values whose magnitude differs from block to block."""
    torch.manual_seed(sum(shape))
    rows = torch.randn(shape[0], *[1] * (len(shape) - 1)) * spread
    return (torch.randn(shape) * torch.exp2(rows)).to(dtype).to(DEVICE)
