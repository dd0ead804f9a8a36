"""The measurement over several GPUs, at toy size and without one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from fuseport_testing.forked import torchrun, torchrun_afresh

ROOT = Path(__file__).parents[2]


def started(
    launch: Callable[..., subprocess.CompletedProcess[str]], ranks: int, *options: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # The toys of several ranks, which would each want a GPU.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    words = ("-m", "benchmarks.bench_multigpu", "--toy", *options)
    return launch(ranks, *words, environment=environment, cwd=ROOT, timeout=200)


def test_all_cases_over_several_processes_are_right(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = started(torchrun, 4, "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert started(torchrun_afresh, 1, "--limit", "1", "--json", str(file)).returncode == 1
    (result,) = json.loads(file.read_text())["results"]
    assert result == {"part": "1,2,3,4", "failed": "rank 0 had to be killed"}
