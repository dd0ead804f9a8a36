"""Several processes on one conversion: the same bytes as one, and an end by name when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fuseport_testing
import pytest
from fuseport_testing.forked import Process, torchrun, torchrun_afresh
from fuseport_testing.tiny import write_tiny

from fuseport.converter import Recipe, convert_checkpoint
from fuseport.converter.group import shares

SUPPORT = Path(fuseport_testing.__path__[0]).parent
LIMIT = 30.0
SMALL_FILES = ("--shard-size", "3000")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", **more}


def contents(directory: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "processes", "options", "recipe"),
    [
        (torchrun_afresh, 2, ["--tp", "4"], Recipe(tp_size=4)),
        (torchrun, 4, ["--tp", "4"], Recipe(tp_size=4)),
        # One file, so that all but one process have nothing to write.
        (torchrun, 2, ["--target", "hf", "--quant", "fp8"], Recipe(target="hf", quant="fp8")),
        (torchrun, 4, ["--target", "hf", *SMALL_FILES], Recipe(target="hf", shard_size=3000)),
    ],
)
def test_torchrun_gives_the_same_bytes(
    launch: Callable[..., subprocess.CompletedProcess[str]],
    processes: int,
    options: list[str],
    recipe: Recipe,
    source: Path,
    tmp_path: Path,
) -> None:
    convert_checkpoint(source, tmp_path / "one", recipe)
    command = ["-m", "fuseport_testing.faulty"]
    command += [str(source), str(tmp_path / "many"), "never", "kill", *options]
    done = launch(processes, *command, environment=environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["many", "one"]


def run_ranks(
    count: int, source: Path, out: Path, phase: str, fault: str, *options: str
) -> list[tuple[int | None, str]]:
    """Exit code (None: it had to be killed) and standard error of each rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # The time limits here are short; several processes that start on one GPU are not.
    common["CUDA_VISIBLE_DEVICES"] = ""
    command = ["-m", "fuseport_testing.faulty", str(source), str(out), phase, fault, "--tp", "4"]
    ranks = [
        Process(*command, *options, environment=environment(RANK=str(rank), **common))
        for rank in range(count)
    ]
    # The limit is the fault's, not that of a busy machine on which several processes start.
    for one in ranks:
        one.wait_for_output(60)
    # A stopped one never ends by itself: it comes last, and is killed.
    broken = int(fault.partition(":")[2])
    order = [rank for rank in range(count) if rank != broken] + [broken]
    deadline = time.monotonic() + LIMIT
    ended = {rank: _ended(ranks[rank], deadline if rank != broken else 0.0) for rank in order}
    return [ended[rank] for rank in range(count)]


def _ended(process: Process, deadline: float) -> tuple[int | None, str]:
    try:
        done = process.end(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as late:
        return None, str(late.stderr)
    return done.returncode, done.stderr


# Rank 2 of three, or rank 0, which holds the common store; what the others then say.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "fault", "match"),
    [
        ("first window", "kill:2", "rank 2 .* gave no sign of life"),
        ("begin", "hang:2", "rank 2 .* gave no sign of life"),
        ("first window", "full:2", "rank 2 .* failed: .*No space left on device"),
        ("manifest", "full:0", "rank 0 .* failed: .*No space left on device"),
        ("manifest", "kill:0", "rank 0 or torchrun died|rank 0 .* gave no sign of life"),
        ("never", "disagree:2", "rank 2 is about to do something else than rank 0: another"),
        ("plan", "kill:2", "rank 2 .* gave no sign of life"),
    ],
)
def test_one_that_fails_ends_all(
    phase: str, fault: str, match: str, source: Path, tmp_path: Path
) -> None:
    import re

    broken = fault.partition(":")[2]
    ranks = run_ranks(3, source, tmp_path / "out", phase, fault)
    for rank, (code, errors) in enumerate(ranks):
        if rank == int(broken):
            continue
        assert code == 1, errors
        assert "Traceback" not in errors
        assert re.search(match, " ".join(errors.split())), errors
    left = os.listdir(tmp_path)
    if fault == "kill:0":
        # Nobody is there to tidy up, but nothing has its name.
        assert "out" not in left
    else:
        assert left == []


def test_shares_are_even_and_complete() -> None:
    sizes = {number: 10 + number % 3 for number in range(20)}
    found = shares(sizes, 3)
    assert sorted(number for one in found for number in one) == list(range(20))
    loads = [sum(sizes[number] for number in one) for one in found]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert shares({0: 5}, 3) == [[0], [], []]
