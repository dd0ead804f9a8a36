"""Python processes that begin with torch imported, for tests that start many.

A fresh interpreter spends seconds until torch, triton and this package are there. The standard
library's fork server imports them once in a session; what it forks has its own arguments,
environment and streams, and nothing of the tests' process. For each launcher one test still starts
an interpreter (`torchrun_afresh`, `command.start`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

# Where a GPU runs the kernels, a process may choose otherwise before it imports them.
PRELOAD = ["torch", "torch.distributed.launcher.api"]
MEGATRON = ["megatron.core.dist_checkpointing", "megatron.core.models.gpt.gpt_layer_specs"]
KERNELS = [
    "fuseport.converter.commands.conversion",
    "fuseport.converter.convert",
    "fuseport.converter.megatron",
    "fuseport.converter.refit",
    # What reads the options, and is imported with the first of them.
    "typer._adapters",
]


class Process:
    """`python ARGUMENTS` from a fork: `-m MODULE ...` or `FILE ...`.

    `environment` is all of it, as for `subprocess.run`; `ranks` starts so many under torchrun.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        ranks: int = 0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for stream in self._streams:
            stream.touch()
        told = (arguments, dict(environment), cwd or Path.cwd(), self._streams, ranks)
        self._process: BaseProcess = serve().Process(target=_begin, args=told)
        self._process.start()

    def wait_for_output(self, timeout: float) -> None:
        """Return when anything is on standard output, or the process has ended."""
        deadline = time.monotonic() + timeout
        while not self._streams[0].stat().st_size and self._process.is_alive():
            assert time.monotonic() < deadline, "the process says nothing"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        """As `subprocess.Popen` has it."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end; raises subprocess.TimeoutExpired, and has then killed the process."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        out, err = (stream.read_text(errors="replace") for stream in self._streams)
        self._folder.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout, out, err)
        return subprocess.CompletedProcess("a forked process", code, out, err)


def run(
    *arguments: str, environment: Mapping[str, str], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, as `subprocess.run` gives its end."""
    return Process(*arguments, environment=environment, cwd=cwd).end(timeout)


def torchrun(
    ranks: int,
    *arguments: str,
    environment: Mapping[str, str],
    timeout: float,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node RANKS ARGUMENTS`, whose agent forks the ranks.

    Beside a GPU each is an interpreter: the agent asks for GPUs, and a fork has no CUDA after that.
    """
    if torch.cuda.is_available():
        return torchrun_afresh(ranks, *arguments, environment=environment, timeout=timeout, cwd=cwd)
    return Process(*arguments, environment=environment, cwd=cwd, ranks=ranks).end(timeout)


def torchrun_afresh(
    ranks: int,
    *arguments: str,
    environment: Mapping[str, str],
    timeout: float,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same by torchrun's command line; each rank is a new interpreter."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def serve() -> ForkServerContext:
    """Start the server unless it is there; its context."""
    context = multiprocessing.get_context("forkserver")
    interpreted = "TRITON_INTERPRET" in os.environ
    context.set_forkserver_preload(PRELOAD + (MEGATRON + KERNELS if interpreted else []))
    # libgomp reads this when torch is imported.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _begin(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    cwd: Path,
    streams: list[Path],
    ranks: int,
) -> None:
    """What an interpreter does before the program's first line."""
    for number, stream in zip((1, 2), streams, strict=True):
        file = os.open(stream, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "fuseport.converter.convert" in sys.modules:
        from .interpreter import remember_builtins

        remember_builtins()
    if ranks:
        _launch(ranks, arguments)
    else:
        _execute(arguments)


def _execute(arguments: tuple[str, ...]) -> None:
    module = arguments[0] == "-m"
    sys.argv = list(arguments[module:])
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def _launch(ranks: int, arguments: tuple[str, ...]) -> None:
    """What torchrun's command line does, except that its agent forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments)


def _rank(arguments: tuple[str, ...]) -> None:
    """One rank; the agent waits for a result, which a `sys.exit(0)` would keep from it."""
    try:
        _execute(arguments)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"the rank ended with {ended.code}") from ended
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
