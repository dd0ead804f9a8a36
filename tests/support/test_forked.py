"""Processes that are forked say, and end, as new interpreters do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fuseport_testing.forked import Process, run, torchrun

SAYS = """
import os, sys
# One write, so that the line stays whole beside another rank's, however Python buffers.
said = (sys.argv[1:], os.environ.get("SAID"), os.getcwd(), os.environ.get("WORLD_SIZE"))
sys.stdout.write(" ".join(map(str, said)) + "\\n")
print("and here", file=sys.stderr)
if os.environ.get("RANK", "1") == "1":
    exec(sys.argv[1])
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "says.py").write_text(SAYS)
    return str(tmp_path / "says.py")


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("os.kill(os.getpid(), 9)", -9)],
)
def test_one_process(end: str, code: int, program: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SAID": "by me"}
    done = run(program, end, environment=environment, timeout=30, cwd=tmp_path)
    assert done.returncode == code
    # A killed one has not flushed what it said.
    if code >= 0:
        assert done.stdout == f"{[end]} by me {tmp_path} None\n"
        assert done.stderr.startswith("and here\n")
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 1), ("1 / 0", 1)]
)
def test_ranks_under_torchrun(end: str, code: int, program: str) -> None:
    done = torchrun(2, program, end, environment=dict(os.environ), timeout=30)
    assert done.returncode == code, done.stderr
    # The agent ends the other rank as soon as one has failed.
    assert done.stdout.count(f"{[end]} None {os.getcwd()} 2\n") in ((1, 2) if code else (2,))
    assert ("ZeroDivisionError" in done.stderr) == (end == "1 / 0")


def test_one_that_does_not_end_is_killed(program: str) -> None:
    process = Process(
        program, "sys.stdout.flush(); import time; time.sleep(60)", environment=dict(os.environ)
    )
    process.wait_for_output(30)
    with pytest.raises(subprocess.TimeoutExpired) as late:
        process.end(0.1)
    assert "None" in str(late.value.stdout)
