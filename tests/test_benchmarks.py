"""The benchmarks at toy size, their own checks, and their count of bytes; without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SUITES = ("kernels", "models", "scaling", "peers", "fresh", "host", "export")


def run(*arguments: str, interpret: bool = False) -> str:
    """A process of its own, which finds `benchmarks`."""
    # pytest-benchmark measures nothing in what it takes for one of several parallel processes, and
    # knows that by the environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("results")
    out = run("-m", "benchmarks.run", *SUITES, "--results", str(directory))
    assert "RED" not in out
    (file,) = directory.iterdir()
    assert file.name == "cpu.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def check_ratios(results: dict[str, Any]) -> None:
    """Each peer's is to fuseport on the same work."""
    rows = results["suites"]["peers"]["rows"]
    own = {(r["case"], r["scheme"]): r["seconds"] for r in rows if r["way"] == "fuseport"}
    others = [r for r in rows if r["way"] != "fuseport"]
    # A peer that cannot be started is skipped: these must not be.
    assert {r["way"] for r in others} == {
        "fuseport, planned anew", "eager", "torch.compile", "Megatron-Core", "Fp8Quantize",
    }  # fmt: skip
    for row in others:
        assert row["ratio"] == pytest.approx(row["seconds"] / own[row["case"], row["scheme"]])


def test_all_suites_run_and_are_recorded(results: dict[str, Any]) -> None:
    pytest.importorskip("megatron.core")
    assert results["card"] == "CPU"
    check_ratios(results)
    assert set(results["suites"]) == set(SUITES)
    for suite in results["suites"].values():
        assert suite["failed"] == []
        assert suite["versions"]["torch"]
        assert suite["command"].startswith("python -m benchmarks.run kernels")
        assert all(row["seconds"] > 0 for row in suite["rows"])


SCRIPT = """
import torch
from benchmarks import kernel_cases as cases
from benchmarks.models import TOY, TOY_MOE, TOY_PEER, of_rank
from benchmarks.peers import apart, own_matrices
from benchmarks.plain_torch import E4M3, converter
from benchmarks.work import Case, Work
from fuseport.kernels.fused_copy import FusedCopy

cpu = torch.device("cpu")


def flip(tensor):
    tensor.view(torch.uint8).view(-1)[5] ^= 1


class Broken:
    def __init__(self, batch, dst):
        self.batch, self.dst = batch, dst

    def run(self):
        self.batch.run()
        flip(self.dst)


for spec in (of_rank(TOY, 2), TOY_MOE):
    work = Work(Case("", spec), "block", cpu)
    good = work.is_equal()
    work.batch = Broken(work.batch, work.planned[-1].dst)
    print(good, work.is_equal(), work.moved_bytes)

sources = [torch.randn(128, 256).bfloat16() for _ in range(2)]
for name, reads in cases.QUANTISED.items():
    make = lambda source: cases.quantised(name, source)
    moves = [make(source) for source in sources]
    FusedCopy(moves).run()
    good, size = cases.is_equal(make, moves), cases.nbytes(moves, reads)
    flip(moves[1].dst)
    print(name, good, cases.is_equal(make, moves), size)

codes, scales = torch.randn(128, 128).to(E4M3), torch.ones(1, 1)
near, far = codes.clone(), codes.clone()
near.view(torch.uint8)[0, 0] ^= 1
far.view(torch.uint8)[0, 0] ^= 4
own = [(codes, scales)]
for other in (codes, near, far):
    print(apart([(other, scales)], own, False), apart([(other, None)], own, True))
print(apart([(codes, scales * 1.01)], own, False), apart([], own, False))
"""
SOURCE, CODES = 2 * 128 * 256, 128 * 256
SIZES = {
    "given": SOURCE + CODES,
    "tensor": 2 * SOURCE + CODES + 8,
    "row": SOURCE + CODES + 4 * 128,
    "block": SOURCE + CODES + 4 * 2,
    "mx": SOURCE + CODES + CODES // 32,
    "nv": 2 * SOURCE + CODES // 2 + CODES // 16 + 8,
}


def linears(rows: int, hidden: int, heads: int, ffn: int, count: int) -> int:
    """Elements of a layer's linear weights."""
    return rows * hidden + hidden * heads + count * 3 * ffn * hidden


def moved() -> list[int]:
    """Bytes of the two toys: every weight is read once, every result is written."""
    # Half a toy: 2 layers of hidden size 64, 4 heads of 8, 4 KV heads, MLPs of 128, 48 words.
    dense = 2 * linears(96, 64, 32, 128, 1)
    kept = 2 * 48 * 64 + 5 * 64
    sizes = [2 * (dense + kept) + dense + 2 * kept + 4 * 2 * 7]
    # 1 layer, 4 heads of 16 and 2 KV heads, 2 experts of 64, 96 words.
    experts = linears(128, 64, 64, 64, 2)
    kept = 2 * 96 * 64 + 3 * 64 + 2 * 16 + 2 * 64
    return [*sizes, 2 * (experts + kept) + experts + 2 * kept + 4 * (4 + 6)]


def test_the_checks_can_fail_and_bytes_are_counted() -> None:
    lines = run("-c", SCRIPT, interpret=True).splitlines()
    assert lines[:2] == [f"True False {size}" for size in moved()]
    assert lines[2:8] == [f"{name} True False {2 * size}" for name, size in SIZES.items()]
    one = 1 / 128**2
    assert lines[8:] == ["0.0 0.0", f"{one} None", "None None", "None None"]
