"""The refit benchmarks' own checks, at toy size and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

# In a process of its own, which finds `benchmarks`.
SCRIPT = """
import torch
from benchmarks.bench_refit import is_equal, moved_bytes
from benchmarks.block_cast import split_and_cast
from benchmarks.models import TOY, TOY_MOE, of_rank, random_weights, shapes
from fuseport.converter import Recipe
from fuseport.converter.refit import Refit

for spec in (of_rank(TOY, 2), TOY_MOE):
    weights = random_weights(shapes(spec), torch.device("cpu"))
    recipe = Recipe(target="hf", quant="fp8-block")
    refit = Refit(weights, spec, recipe)
    casts = split_and_cast(weights, spec, lambda matrix: (matrix, matrix))
    print(is_equal(refit, weights, spec, recipe), moved_bytes(refit, weights), casts)
    other = {name: value * 2 for name, value in weights.items()}
    print(is_equal(refit, other, spec, recipe))
"""


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


def linears(rows: int, hidden: int, heads: int, ffn: int, count: int) -> int:
    """Elements of a layer's linear weights."""
    return rows * hidden + hidden * heads + count * 3 * ffn * hidden


def test_the_check_can_fail_and_bytes_are_counted() -> None:
    # Half a toy: 2 layers of hidden size 64, 4 heads of 8, 4 KV heads, MLPs of 128, 48 words.
    dense = 2 * linears(96, 64, 32, 128, 1)
    kept = 2 * 48 * 64 + 5 * 64
    blocks = 4 * 2 * (1 + 1 + 1 + 1 + 1 + 1 + 1)
    sizes = [2 * (dense + kept) + dense + 2 * kept + blocks]
    # 1 layer, 4 heads of 16 and 2 KV heads, 2 experts of 64, 96 words.
    experts = linears(128, 64, 64, 64, 2)
    kept = 2 * 96 * 64 + 3 * 64 + 2 * 16 + 2 * 64
    sizes += [2 * (experts + kept) + experts + 2 * kept + 4 * (4 + 6)]
    lines = run("-c", SCRIPT)
    assert lines[0::2] == [f"True {sizes[0]} 14", f"True {sizes[1]} 10"]
    assert lines[1::2] == ["False", "False"]


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
