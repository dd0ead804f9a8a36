"""Compile a kernel ahead of time, without a GPU, and read facts off its assembly.

What a kernel's speed hangs on shows in its code: how wide each global access is, whether
registers spill to local memory, and whether an fp8 cast takes a detour through fp16 (two
roundings). These can be checked for every architecture on any machine that has triton.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Signature = Mapping[str, str]

WARP_SIZE = 32
# ld.global.L1::evict_last.v4.b32 and the like; a predicate in front does not matter.
_ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)*?\.global(?:\.[\w:]+)*)")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
_FP8_FROM_FP16 = re.compile(r"\bcvt(?:\.\w+)*\.e(?:4m3|5m2)x2\.f16x2\b")
_LOCAL_SASS = re.compile(r"\b(?:STL|LDL)(?:\.\w+)*\b")


@dataclass(frozen=True)
class Assembly:
    """The code of one kernel for one architecture, and what can be read off it.

    `load_widths` and `store_widths` are the bytes that one thread moves in each global access
    instruction, in the order of the PTX. The assembler says how much local memory a thread has;
    `local_accesses` counts the instructions, for which the code is disassembled (half a second),
    and is None where there is no disassembler.
    """

    arch: int
    ptx: str
    cubin: bytes
    load_widths: tuple[int, ...]
    store_widths: tuple[int, ...]
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    fp8_through_fp16: bool

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything spills, or an array did not fit the registers."""
        return self.stack_bytes + self.spill_store_bytes > 0

    @cached_property
    def local_accesses(self) -> int | None:
        """Instructions that read or write local memory: none without a frame on the stack."""
        sass = _disassemble(self.cubin)
        return None if sass is None else len(_LOCAL_SASS.findall(sass))


def compile_kernel(
    fn: object,
    signature: Signature,
    constexprs: Mapping[str, object],
    *,
    arch: int,
    options: Mapping[str, int] = MappingProxyType({}),
    divisible: Collection[str] = (),
) -> Assembly:
    """Compile `fn` for compute capability `arch` (80, 90, 100) and describe the result.

    signature: the type of each argument that is not a constexpr: `*bf16`, `*fp8e4nv`, `i32`, ...
    options: `num_warps`, `maxnreg`, as a launch takes them.
    divisible: the arguments (pointers' addresses, integers) that are known multiples of 16.
    Raises TypeError if `fn` is not compilable, as under TRITON_INTERPRET=1, and ValueError if the
    names are not the kernel's arguments.
    """
    source = source_of(fn, signature, constexprs, divisible)
    target = GPUTarget("cuda", arch, WARP_SIZE)
    # A kernel out of the cache has no log.
    with (
        redirect_stdout(io.StringIO()) as log,
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=dict(options))
    return _describe(arch, compiled.asm["ptx"], compiled.asm["cubin"], log.getvalue())


def source_of(
    fn: object,
    signature: Signature,
    constexprs: Mapping[str, object],
    divisible: Collection[str],
) -> ASTSource:
    """What triton compiles; raises as `compile_kernel` says."""
    if not isinstance(fn, triton.JITFunction):
        raise TypeError(f"{fn!r} cannot be compiled: not a triton.jit function, or interpreted")
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    wrong = (given.keys() ^ set(fn.arg_names)) | (set(divisible) - signature.keys())
    if wrong:
        raise ValueError(f"{fn.__name__}: missing or unknown arguments {sorted(wrong)}")
    ordered = {name: given[name] for name in fn.arg_names}
    hint = [["tt.divisibility", 16]]
    hints = {(fn.arg_names.index(name),): hint for name in divisible}
    return ASTSource(fn, ordered, dict(constexprs), hints)


def _describe(arch: int, ptx: str, cubin: bytes, log: str) -> Assembly:
    """`log` is what the assembler says of registers and local memory."""
    return Assembly(
        arch=arch,
        ptx=ptx,
        cubin=cubin,
        load_widths=access_widths(ptx, "ld"),
        store_widths=access_widths(ptx, "st"),
        registers=_number(r"Used (\d+) registers", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", log),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", log),
        fp8_through_fp16=_FP8_FROM_FP16.search(ptx) is not None,
    )


def access_widths(ptx: str, kind: str) -> tuple[int, ...]:
    """Bytes a thread of each global `ld` or `st`; asynchronous copies count as loads."""
    widths = []
    for line in ptx.splitlines():
        if (found := _ACCESS.search(line)) and found[1] == kind:
            widths.append(_width(found[2]))
        elif kind == "ld" and (found := _ASYNC_COPY.search(line)):
            widths.append(int(found[1], 0))
    return tuple(widths)


def _width(modifiers: str) -> int:
    """Bytes of `.global.v4.b32`: the vector length, if any, times the element's bits."""
    parts = modifiers.split(".")
    lanes = [int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)]
    bits = int(parts[-1].lstrip("bsuf"))
    return (lanes[0] if lanes else 1) * bits // 8


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"the assembler's log does not say {pattern!r}:\n{log}")
    return int(found[1])


def _disassemble(cubin: bytes) -> str | None:
    try:
        tool = knobs.nvidia.nvdisasm.path
    except RuntimeError:  # what triton raises for a tool that is not there
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
