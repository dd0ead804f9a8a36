"""Every kernel compiles for every architecture, moves 16 bytes at a time and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Compile all once for every process of a parallel run."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    file = common / "aot.jsonl"
    with FileLock(common / "aot.lock"):
        if not file.exists():
            file.write_text(compile_all())
    return [json.loads(line) for line in file.read_text().splitlines()]


def compile_all() -> str:
    # A process of its own: elsewhere in the suite the kernels run in Triton's interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot_moves"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
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
    assert len(rows) - len(plain) == 3 * (5 * 2 + 5 + 2 * 2)


def test_accesses_are_16_bytes_wide(rows: list[dict[str, object]]) -> None:
    assert not [row for row in rows if row["load"] != 16]
    assert not [row for row in rows if row["stores"] != STORES[str(row["scheme"])]]


def test_nothing_spills(rows: list[dict[str, object]]) -> None:
    assert not [row for row in rows if row["local"]]


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


def test_enough_programs_have_room(rows: list[dict[str, object]]) -> None:
    usual = [
        row
        for row in rows
        if (row["src"], row["order"]) == ("torch.bfloat16", "straight") and not row.get("count")
    ]
    assert {row["scheme"] for row in usual} == set(REGISTERS)
    assert not [row for row in usual if int(str(row["registers"])) > REGISTERS[str(row["scheme"])]]
    assert not [row for row in rows if int(str(row["registers"])) > 128]


def test_amd_gets_the_same_accesses_and_no_fp8_of_its_own(rows: list[dict[str, object]]) -> None:
    found = [row for row in rows if row["arch"] == AMD]
    if not found:
        pytest.skip("this triton cannot compile for AMD")
    # Widths and spills are checked with the others'.
    assert {row["scheme"] for row in found} == set(STORES) - {"amax"}
    assert len(found) == 5 + 4 * 2
    assert not [row for row in found if row["native_fp8"]]
