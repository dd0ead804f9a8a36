"""The benchmark's own check and its count of bytes, at toy size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own, which finds `benchmarks` and runs the kernels in Triton's interpreter.
SCRIPT = """
import torch
from benchmarks.bench_quant import SCHEMES, is_equal, move, nbytes
from fuseport.kernels.fused_copy import FusedCopy

sources = [torch.randn(128, 256).bfloat16() for _ in range(2)]
for name in SCHEMES:
    moves = [move(name, source) for source in sources]
    FusedCopy(moves).run()
    good, size = is_equal(name, moves), nbytes(name, moves)
    moves[1].dst.view(torch.uint8)[5, 7] ^= 1
    print(name, good, is_equal(name, moves), size)
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


def test_the_check_can_fail_and_bytes_are_counted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{name} True False {2 * size}" for name, size in SIZES.items()]
    assert done.stdout.splitlines() == expected
