"""Compile the moves' kernels for each architecture and print what its assembly says, as JSON.

    python -m benchmarks.aot_moves [80 90 100] [gfx942]

One line a combination. Needs no GPU; must not run in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch

from fuseport.kernels.amax_kernel import amax_kernel
from fuseport.kernels.kinds import Kind, row_tile
from fuseport.kernels.options import amax_constants, constants, kernel_of, resources

from . import aot_amd
from .aot import Assembly, compile_kernel
from .aot_amd import AmdAssembly

SOURCES = (torch.bfloat16, torch.float32)
TARGETS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
ORDERS = ("straight", "transposed")
COMPUTED = ("tensor", "row", "block", "mx", "nv")
TABLES = {"descriptors": "*i64", "tile_table": "*i32"}
POINTERS = {**TABLES, "counters": "*i64", "power": "*fp64"}
E4M3 = torch.float8_e4m3fn


def combinations() -> Iterator[tuple[Kind, bool]]:
    """(kind, counting): every conversion straight and transposed, and counting where it costs."""
    for src, scheme, order in itertools.product(SOURCES, COMPUTED, ORDERS):
        codes = torch.uint8 if scheme == "nv" else E4M3
        width = row_tile(8192, order) if scheme == "row" else 0
        kind = Kind(src, codes, order, True, scheme=scheme, row_tile=width)
        yield kind, False
        if src is torch.bfloat16:
            yield kind, True
    for src, dst, order in itertools.product(SOURCES, TARGETS, ORDERS):
        same, given = src == dst, dst is E4M3
        kind = Kind(src, dst, order, True, same, False, "given" if given else "none")
        yield kind, False
        if src is torch.bfloat16 and (given or same):
            yield kind, True


def describe(kind: Kind, count: bool, arch: int) -> dict[str, object]:
    """What the code of one combination for one architecture looks like."""
    # sm_90 and later have a conversion to e4m3 that rounds once; the integer route is tried too.
    native = arch >= 90
    code = compile_kernel(
        kernel_of(kind),
        POINTERS,
        constants(kind, count, False, native),
        arch=arch,
        options=resources(kind, count),
        divisible=tuple(POINTERS),
    )
    return {"scheme": kind.scheme, "count": count, **_facts(kind, code)}


def describe_amd(kind: Kind) -> dict[str, object]:
    """The same for AMD's gfx942, whose e4m3 is made by integer arithmetic."""
    code = aot_amd.compile_kernel(
        kernel_of(kind),
        POINTERS,
        constants(kind, False, False, False),
        options=resources(kind, False),
        divisible=tuple(POINTERS),
    )
    return {
        "arch": aot_amd.ARCH,
        "scheme": kind.scheme,
        **_both(kind, code),
        "local": code.stack_bytes > 0,
        "native_fp8": code.native_fp8,
    }


def describe_amax(src: torch.dtype, order: str, arch: int) -> dict[str, object]:
    """The same of the first of two passes."""
    kind = Kind(src, E4M3, order, True, scheme="tensor")
    code = compile_kernel(
        amax_kernel, TABLES, amax_constants(kind), arch=arch, divisible=tuple(TABLES)
    )
    return {"scheme": "amax", "count": False, **_facts(kind, code)}


def _facts(kind: Kind, code: Assembly) -> dict[str, object]:
    return {
        "arch": code.arch,
        **_both(kind, code),
        "local": code.uses_local_memory,
        "stack": code.stack_bytes,
        "double_rounding": code.fp8_through_fp16,
        # The kernels leave it to the conversion to saturate.
        "wraps": "cvt.rn.e4m3x2" in code.ptx,
    }


def _both(kind: Kind, code: Assembly | AmdAssembly) -> dict[str, object]:
    """What is said of either vendor's code."""
    return {
        "src": str(kind.src),
        "dst": str(kind.dst),
        "order": kind.order,
        # The tables are read by scalars; the data is what is moved 16 bytes at a time.
        "load": max(code.load_widths),
        "loads": {width: code.load_widths.count(width) for width in sorted(set(code.load_widths))},
        "stores": sorted(set(code.store_widths)),
        "registers": code.registers,
    }


def main() -> None:
    """Print a line for each combination and architecture named on the command line."""
    amd = [aot_amd.ARCH] if aot_amd.is_available() else []
    chosen = sys.argv[1:] or ["80", "90", "100", *amd]
    archs = [int(arch) for arch in chosen if arch.isdigit()]
    for (kind, count), arch in itertools.product(combinations(), archs):
        print(json.dumps(describe(kind, count, arch)), flush=True)
    for src, order, arch in itertools.product(SOURCES, ORDERS, archs):
        print(json.dumps(describe_amax(src, order, arch)), flush=True)
    if aot_amd.ARCH in chosen:
        # Half of them, and none that counts: here only the shape of the code is looked at.
        for kind in (one for one, count in combinations() if one.src is SOURCES[0] and not count):
            print(json.dumps(describe_amd(kind)), flush=True)


if __name__ == "__main__":
    main()
