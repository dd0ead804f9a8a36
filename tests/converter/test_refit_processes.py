"""Refits of a model that four processes have split, over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import fuseport_testing
from fuseport_testing.forked import torchrun

PACKAGE = Path(fuseport_testing.__path__[0])


def test_every_way_of_splitting_gives_the_whole_model_s_bits() -> None:
    """Bits, bytes sent and the elements that each process lacks are compared in the worker."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    worker = str(PACKAGE / "refit_worker.py")
    done = torchrun(4, worker, environment=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "same tp: 0 bytes"
    assert len(lines) == 23
