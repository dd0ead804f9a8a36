"""What the kernels of a batch are compiled with: constants by kind, warps, registers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
import triton
import triton.language as tl

from .amax_kernel import amax_kernel
from .kinds import TRANSPOSED_TILES, Kind
from .move_kernel import move_kernel
from .numerics import LARGEST_SOURCE
from .region_kernel import region_kernel

_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def kernel_of(kind: Kind) -> triton.runtime.JITFunction:
    """The kernel that runs a kind of move."""
    return region_kernel if kind.scheme in ("row", "block", "mx", "nv") else move_kernel


@cache
def constants(
    kind: Kind, count: bool, power: bool, native: bool, careful: bool = False
) -> Mapping[str, object]:
    """`kernel_of(kind)`'s constexpr arguments."""
    rows, cols = kind.tile
    floating = kind.src in (torch.float32, torch.bfloat16, torch.float16)
    unsigned = _UNSIGNED[kind.src.itemsize]
    known: dict[str, object] = {
        "SRC": _TRITON[kind.src] if floating else unsigned,
        "DST": _TRITON.get(kind.dst, unsigned),
        "DST_BITS": _UNSIGNED[kind.dst.itemsize],
        "ORDER": kind.order,
        "VECTOR": kind.vector,
        "BIT_COPY": kind.bit_copy,
        "SHIFT": kind.shift,
        "SCHEME": kind.scheme,
        "LOOP": kind.row_tile < 0,
        "COUNT": count and floating,
        "POWER": power and kind.scheme != "none",
        "LARGEST_BITS": int(np.float32(LARGEST_SOURCE.get(kind.dst, 0.0)).view(np.int32)),
        "NATIVE": native,
        "CAREFUL": careful,
        "ROWS": rows,
        "COLS": cols,
    }
    names = kernel_of(kind).arg_names
    return MappingProxyType({name: known[name] for name in names if name in known})


@cache
def amax_constants(kind: Kind) -> Mapping[str, object]:
    """The first pass's constexpr arguments, for the same tables."""
    known = {**constants(kind, False, False, False), "ORDER": kind.order, "SHIFT": kind.shift}
    return MappingProxyType({x: known[x] for x in amax_kernel.arg_names if x in known})


def resources(kind: Kind, more: bool) -> dict[str, int]:
    """Warps of a program, and registers of a thread where ptxas would take too many.

    `more` says that there is more to do than to convert: to count, to sum, or to be careful.

    What hides the latency of a tile is other programs on the same multiprocessor. Measured on an
    H100: three programs of 256 threads give blocks 0.97 of the copy, two give 0.88; rows with 64
    elements a thread get 0.98, with 32 they get 0.93. Blocks of a transposed source are turned in
    shared memory: from bf16 they get 0.93 with 128 elements a thread, 0.88 with 64, from fp32 0.96
    and 0.94; but so many leave no registers for anything else, and fp32's leave none on sm_80.
    """
    if kind.order == "transposed" and kind.scheme in TRANSPOSED_TILES:
        small = kind.vector and kind.src.itemsize == 2 and not more
        many = kind.scheme in ("mx", "nv") or (kind.scheme == "block" and small)
        return {"num_warps": 4 if many else 8}
    if kind.scheme == "row":
        return {"num_warps": kind.tile[0] * kind.tile[1] // 2048}
    if kind.scheme == "block":
        return {"num_warps": 8} | ({"maxnreg": 80} if kind.src.itemsize == 2 else {})
    return {"num_warps": 8 if more and kind.order == "transposed" else 4}


def has_native_e4m3(device: torch.device) -> bool:
    """True where the hardware's fp32 → e4m3 conversion rounds once: NVIDIA sm_90 and later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
