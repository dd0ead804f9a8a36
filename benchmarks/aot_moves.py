"""Compile the moves' kernel for each architecture and print what its assembly says, as JSON.

    python -m benchmarks.aot_moves [80 90 100]

One line a combination. Needs no GPU; must not run in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch

from fuseport.kernels.fused_copy import Kind, constants, warps
from fuseport.kernels.move_kernel import move_kernel

from .aot import compile_kernel

SOURCES = (torch.bfloat16, torch.float32)
TARGETS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
POINTERS = {"descriptors": "*i64", "tile_table": "*i32", "counters": "*i64"}


def combinations() -> Iterator[tuple[Kind, bool]]:
    """(kind, counting): every conversion straight and transposed, and counting where it costs."""
    for src, dst, order in itertools.product(SOURCES, TARGETS, ("straight", "transposed")):
        same, scaled = src == dst, dst is torch.float8_e4m3fn
        kind = Kind(src, dst, order, True, same, False, scaled)
        yield kind, False
        if scaled or same:
            yield kind, True


def describe(kind: Kind, count: bool, arch: int) -> dict[str, object]:
    """What the code of one combination for one architecture looks like."""
    # sm_90 and later have a conversion to e4m3 that rounds once; the integer route is tried too.
    native = arch >= 90
    code = compile_kernel(
        move_kernel,
        POINTERS,
        constants(kind, count, native),
        arch=arch,
        num_warps=warps(kind, count),
        divisible=tuple(POINTERS),
    )
    return {
        "arch": arch,
        "src": str(kind.src),
        "dst": str(kind.dst),
        "order": kind.order,
        "count": count,
        # The tables are read by scalars; the data is what is moved 16 bytes at a time.
        "load": max(code.load_widths),
        "stores": sorted(set(code.store_widths)),
        "registers": code.registers,
        "local": code.uses_local_memory,
        "double_rounding": code.fp8_through_fp16,
    }


def main() -> None:
    """Print a line for each combination and architecture named on the command line."""
    archs = [int(arch) for arch in sys.argv[1:]] or [80, 90, 100]
    for (kind, count), arch in itertools.product(combinations(), archs):
        print(json.dumps(describe(kind, count, arch)), flush=True)


if __name__ == "__main__":
    main()
