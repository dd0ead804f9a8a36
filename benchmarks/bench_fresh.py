"""A fresh process to its first result, with empty and with warm caches on disk.

    python -m benchmarks.run fresh

One tensor parallel rank of a Llama-3-70B. The clock starts when the weights are on the GPU, and
includes each way's own imports. torch.compile's first result is there before its CUDA graph is:
the time until the first replay is shown as well. An empty kernel shows what none of them can avoid.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .bench_peers import CASES, ON_GPU
from .conftest import Bench
from .fresh import FLOORS, WAYS
from .results import Row
from .work import QUANT_SCALE, SCHEMES, Case

CASE = CASES[0]
ROOT = Path(__file__).parents[1]


def task(case: Case, scheme: str) -> str:
    """What a process is told."""
    facts = {
        one.name: getattr(case.spec, one.name)
        for one in dataclasses.fields(case.spec)
        if isinstance(getattr(case.spec, one.name), (bool, int, float, str))
    }
    told = {
        "shapes": case.shapes(), "spec": facts, "scheme": scheme, "quant_scale": QUANT_SCALE,
        "recipe": {"target": "hf", **SCHEMES[scheme]},
    }  # fmt: skip
    return json.dumps(told)


def started(way: str, scheme: str, cache: Path) -> dict[str, float]:
    """Seconds of each point of a new process."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "benchmarks.fresh", way]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=task(CASE, scheme), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not said["right"]:
        pytest.fail("RED: the result is not right; no figure")
    points: dict[str, float] = said["points"]
    return points


SCHEMES_HERE = ("given", "block") if ON_GPU else ("given",)
STATES = ("empty", "warm") if ON_GPU else ("empty",)


@pytest.mark.parametrize("scheme", SCHEMES_HERE)
@pytest.mark.parametrize("way", [*WAYS, *FLOORS])
def test_fresh(way: str, scheme: str, bench: Bench, tmp_path: Path) -> None:
    """Twice with one cache directory: first it is empty, then it is warm."""
    for state in STATES:
        points = started(way, scheme, tmp_path)
        name = f"{CASE.name}, {state} caches"
        first = points.pop("first result")
        own = bench.own("fresh", name, scheme)
        row = Row(
            name, scheme, way, 0, first, 0.0, 1, ratio=first / own if own else None,
            details=points,
        )  # fmt: skip
        bench.add("fresh", row)
