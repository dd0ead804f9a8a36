"""Refits of a model that four processes have split, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuseport_testing

PACKAGE = Path(fuseport_testing.__path__[0])


def test_every_way_of_splitting_gives_the_whole_model_s_bits() -> None:
    """Bits, bytes sent and the elements that each process lacks are compared in the worker."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(PACKAGE / "refit_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "same tp: 0 bytes"
    assert len(lines) == 23
