"""The command line, run in a process of its own or here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Protocol

# The command, as the installed script runs it.
MAIN = "from fuseport.converter.cli import main; main()"
WIDTH = 80


def start(*args: object, **env: str) -> subprocess.Popen[str]:
    """Start the command on pipes, as for a log file."""
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**plain, "PYTHONIOENCODING": "utf-8", **env},
    )


def check(status: int, found: int, out: str, err: str) -> None:
    """The exit code is right, and the output fits the width and has no colours."""
    assert found == status, err
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    assert all(len(line) <= WIDTH for line in out.splitlines()), out


def run_process(*args: object, status: int = 0, **env: str) -> tuple[str, str]:
    """The output and the errors of a run of its own that ends with `status`."""
    process = start(*args, **env)
    out, err = process.communicate(timeout=120)
    check(status, process.returncode, out, err)
    return out, err


class Run(Protocol):
    """Like `run_process`, but here, where torch is imported already."""

    def __call__(self, *args: object, status: int = 0) -> tuple[str, str]: ...
