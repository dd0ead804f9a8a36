"""Compile a kernel ahead of time, without a GPU, and read facts off its assembly.

What a kernel's speed hangs on shows in its code: how wide each global access is, whether
registers spill to local memory, and whether an fp8 cast takes a detour through fp16 (two
roundings). These can be checked for every architecture on any machine that has triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
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
    instruction, in the order of the PTX. `sass` is None where there is no disassembler;
    `local_accesses` then comes out as 0, and `stack_bytes` still tells of local memory.
    """

    arch: int
    ptx: str
    sass: str | None
    load_widths: tuple[int, ...]
    store_widths: tuple[int, ...]
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    local_accesses: int
    fp8_through_fp16: bool

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything spills, or an array did not fit the registers."""
        return self.stack_bytes + self.spill_store_bytes + self.local_accesses > 0


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
    compiled = triton.compile(source, target=target, options=dict(options))
    return _describe(arch, compiled.asm["ptx"], compiled.asm["cubin"])


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


def _describe(arch: int, ptx: str, cubin: bytes) -> Assembly:
    sass = _disassemble(cubin)
    log = _assembler_log(arch, ptx)
    return Assembly(
        arch=arch,
        ptx=ptx,
        sass=sass,
        load_widths=access_widths(ptx, "ld"),
        store_widths=access_widths(ptx, "st"),
        registers=_number(r"Used (\d+) registers", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", log),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", log),
        local_accesses=len(_LOCAL_SASS.findall(sass or "")),
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


def _assembler_log(arch: int, ptx: str) -> str:
    """Assemble once more with -v: the compiler keeps the spill counts to itself."""
    # The assembler for this generation came with triton 3.5 as a program of its own.
    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    name = re.search(r"^\s*\.target\s+(\w+)", ptx, re.MULTILINE)
    assert name is not None, "PTX always names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={name[1]}", str(source), "-o", f"{folder}/cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


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
