"""The benchmark over several processes, at toy size and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # The toys of several ranks, which would each want a GPU.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("processes", [1, 4])
def test_all_cases_over_several_processes_are_right(processes: int) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    first, *lines = run(*launch, "-m", "benchmarks.bench_multigpu", "--toy")
    assert first.startswith(f"{processes} × ")
    assert len(lines) == (5 if processes > 1 else 1)
    assert not [line for line in lines if "RED" in line]
    silent = [line for line in lines if "sent     0.000 MB" in line]
    assert silent == lines[:1]
