"""The measurement over several GPUs, at toy size and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # The toys of several ranks, which would each want a GPU.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def run(*arguments: str) -> list[str]:
    done = started(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_all_cases_over_several_processes_are_right(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    file = tmp_path / "results.json"
    run(*launch, "-m", "benchmarks.bench_multigpu", "--toy", "--json", str(file))
    found = json.loads(file.read_text())
    assert (found["processes"], found["torch"]) == (4, torch.__version__)
    results = found["results"]
    assert [one["part"] for one in results] == [1, 2, 3, 3, 3, 4, 4]
    assert all(one["right"] for one in results)
    travels = [one for one in results if "sent_bytes" in one]
    assert [one["part"] for one in travels] == [2, 3, 3, 3]
    assert all(one["sent_bytes"] == one["planned_bytes"] > 0 for one in travels)


def test_a_part_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m")
    options = ("--toy", "--limit", "1", "--json", str(file))
    assert started(*launch, "benchmarks.bench_multigpu", *options).returncode == 1
    (result,) = json.loads(file.read_text())["results"]
    assert result == {"part": "1,2,3,4", "failed": "rank 0 had to be killed"}
