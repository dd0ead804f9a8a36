"""Every kernel compiles for every architecture, moves 16 bytes at a time and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
# Than those which kernels were timed and tuned with.
IS_NEWER = tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)


pytestmark = pytest.mark.timeout(900)


# All rows; then the same kernel with as many registers as it asks for, and with far fewer.
CODE = """
import dataclasses, json
from benchmarks import aot_moves
from benchmarks.aot import compile_kernel
aot_moves.main()
kind = next(kind for kind, _ in aot_moves.combinations() if kind.scheme == "row")
constants = aot_moves.constants(kind, False, False, True)
kernel, names = aot_moves.kernel_of(kind), aot_moves.POINTERS
for options in {}, {"maxnreg": 24}:
    code = compile_kernel(kernel, names, constants, arch=90, options=options, divisible=names)
    found = [code.stack_bytes, code.spill_store_bytes, code.spill_load_bytes, code.local_accesses]
    print(json.dumps(["registers", *options.values(), code.uses_local_memory, found]))
for kind in [kind for kind, count in aot_moves.combinations() if not count]:
    if kind.scheme in aot_moves.COMPUTED and kind.src.itemsize == 2:
        kind = dataclasses.replace(kind, vector=False)
        print(json.dumps({"unaligned": aot_moves.describe(kind, False, 90)}))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Compile all once for every process of a parallel run."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    file = common / "aot.jsonl"
    with FileLock(common / "aot.lock"):
        if not file.exists():
            file.write_text(compile_all())
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(lines: list[Any]) -> list[dict[str, object]]:
    return [line for line in lines if isinstance(line, dict) and "unaligned" not in line]


@pytest.fixture(scope="module")
def unaligned(lines: list[Any]) -> list[dict[str, object]]:
    """Where nothing is known to be a multiple of 16."""
    return [line["unaligned"] for line in lines if isinstance(line, dict) and "unaligned" in line]


def compile_all() -> str:
    # A process of its own: elsewhere in the suite the kernels run in Triton's interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# What a kernel stores beside its codes: a scale (4 or 1 bytes), a flag or an amax (4).
STORES = {
    "none": [16],
    "given": [16],
    "amax": [4],
    "tensor": [4, 16],
    "row": [4, 16],
    "block": [4, 16],
    "mx": [1, 4, 16],
    # Four-bit codes of the 16 bytes that a thread loads twice.
    "nv": [1, 4, 8],
}


AMD = "gfx942"


def of_nvidia(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [row for row in rows if row["arch"] != AMD]


def test_all_combinations_compile(rows: list[dict[str, object]]) -> None:
    rows = of_nvidia(rows)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["scheme"] for row in rows} == set(STORES)
    plain = [row for row in rows if row["scheme"] in ("none", "given")]
    assert len(plain) == 3 * (2 * 4 * 2 + 2 * 2)
    assert len(rows) - len(plain) == 3 * (5 * 2 * 2 + 5 * 2 + 2 * 2)


def is_turned(row: dict[str, object], *schemes: str) -> bool:
    return row["order"] == "transposed" and row["scheme"] in schemes


def test_accesses_are_16_bytes_wide(rows: list[dict[str, object]]) -> None:
    """But loads of a transposed source's pieces, of which a thread reads two rows at a time."""
    narrow = [row for row in rows if row["load"] != 16]
    assert narrow == [row for row in rows if is_turned(row, "mx", "nv")]
    for row in narrow:
        loads = {int(width): times for width, times in cast("Any", row["loads"]).items()}
        two_rows = 4 if row["src"] == "torch.bfloat16" else 8
        # A warp of AMD's has twice the threads.
        assert loads[two_rows] >= (8 if row["arch"] == AMD else 16)
        assert min(loads) >= 4
    assert not [row for row in rows if row["stores"] != STORES[str(row["scheme"])]]


def test_nothing_spills(rows: list[dict[str, object]], unaligned: list[dict[str, object]]) -> None:
    assert len(unaligned) == 5 * 2
    spilled = [row for row in rows if row["local"]]
    if IS_NEWER:
        # Ten registers of blocks, which are held to 80.
        assert all((row["scheme"], row["order"]) == ("block", "straight") for row in spilled)
        assert all(int(str(row["stack"])) <= 40 for row in spilled)
    else:
        assert not spilled
    # Held to 80 registers too, which suits aligned ones, the rows of nearly every model.
    assert [(row["scheme"], row["order"]) for row in unaligned if row["local"]] == [
        ("block", "straight")
    ]


def test_a_kernel_that_spills_is_seen(lines: list[Any]) -> None:
    """By what the assembler says, and by the instructions where they can be looked at."""
    free, held = (line[1:] for line in lines if isinstance(line, list))
    assert free in ([False, [0, 0, 0, 0]], [False, [0, 0, 0, None]])
    registers, seen, found = held
    assert (registers, seen) == (24, True)
    assert all(number is None or number > 0 for number in found)


def test_no_conversion_rounds_twice(rows: list[dict[str, object]]) -> None:
    assert not [row for row in of_nvidia(rows) if row["double_rounding"]]


def test_conversions_saturate_by_themselves(rows: list[dict[str, object]]) -> None:
    assert not [row for row in of_nvidia(rows) if row["wraps"]]


# Most registers of a thread where bf16 is converted without counting: what the programs that hide
# one another's latency have room for.
REGISTERS = {
    "none": 40,
    "given": 40,
    "amax": 40,
    "tensor": 64,
    "row": 80,
    "block": 80,
    "mx": 64,
    "nv": 80,
}


# NVFP4 with a newer Triton than kernels were timed with.
NEWER = {"nv": 96}


def test_enough_programs_have_room(rows: list[dict[str, object]]) -> None:
    usual = [
        row
        for row in rows
        if (row["src"], row["order"]) == ("torch.bfloat16", "straight") and not row.get("count")
    ]
    assert {row["scheme"] for row in usual} == set(REGISTERS)
    allowed = REGISTERS | (NEWER if IS_NEWER else {})
    assert not [row for row in usual if int(str(row["registers"])) > allowed[str(row["scheme"])]]
    most = [row for row in rows if int(str(row["registers"])) > 128]
    # These have more elements a thread, and so fewer threads.
    assert not [row for row in most if not is_turned(row, "block", "mx")]


def test_amd_gets_the_same_accesses_and_no_fp8_of_its_own(rows: list[dict[str, object]]) -> None:
    found = [row for row in rows if row["arch"] == AMD]
    if not found:
        pytest.skip("this triton cannot compile for AMD")
    # Widths and spills are checked with the others'.
    assert {row["scheme"] for row in found} == set(STORES) - {"amax"}
    assert len(found) == 5 * 2 + 4 * 2
    assert not [row for row in found if row["native_fp8"]]
