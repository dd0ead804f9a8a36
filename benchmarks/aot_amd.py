"""The same as `aot` for AMD's gfx942, as far as its assembly says: no GPU is needed either."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget

from .aot import Signature, source_of

ARCH, WAVE = "gfx942", 64
# global_load_dwordx4, buffer_store_short, global_load_ubyte; what lies in scratch is a spill.
_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(dword|[us]?short|[us]?byte)(?:x(\d))?"
)
_BYTES = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1, "ubyte": 1, "sbyte": 1}
# The hardware's own e4m3 has other codes (its zero has no sign, its bias is 8).
_NATIVE_FP8 = re.compile(r"\bv_cvt_(?:pk_fp8|sr_fp8)_")


@dataclass(frozen=True)
class AmdAssembly:
    """The code of one kernel; `stack_bytes` is private memory of a thread, spills included."""

    load_widths: tuple[int, ...]
    store_widths: tuple[int, ...]
    registers: int
    stack_bytes: int
    native_fp8: bool


def is_available() -> bool:
    """True if this triton can compile for AMD."""
    return "amd" in backends


def compile_kernel(
    fn: object,
    signature: Signature,
    constexprs: Mapping[str, object],
    *,
    options: Mapping[str, int],
    divisible: Collection[str],
) -> AmdAssembly:
    """Compile `fn` for gfx942; the arguments are those of `aot.compile_kernel`."""
    source = source_of(fn, signature, constexprs, divisible)
    # A limit of registers is an option of NVIDIA's compiler alone.
    known = {name: value for name, value in options.items() if name != "maxnreg"}
    compiled = triton.compile(source, target=GPUTarget("hip", ARCH, WAVE), options=known)
    code: str = compiled.asm["amdgcn"]
    return AmdAssembly(
        load_widths=_widths(code, "load"),
        store_widths=_widths(code, "store"),
        registers=_number("vgpr_count", code),
        stack_bytes=_number("private_segment_fixed_size", code),
        native_fp8=_NATIVE_FP8.search(code) is not None,
    )


def _widths(code: str, kind: str) -> tuple[int, ...]:
    found = (match for match in _ACCESS.finditer(code) if match[1] == kind)
    return tuple(_BYTES[match[2]] * int(match[3] or 1) for match in found)


def _number(name: str, code: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", code)
    if found is None:
        raise ValueError(f"the assembly does not say {name}")
    return int(found[1])
