"""Makes the test assets importable, and keeps each Megatron run for the whole session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Each process of a parallel run, and what it starts, gets its share of the cores: torch would
# otherwise begin as many threads in each as the machine has cores. It reads this when imported.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the kernels run in Triton's interpreter; it must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The folder holds one uniquely named package. The repository's root stays off the path: its
# `kernels` folder must not become importable under that name.
sys.path.insert(0, str(Path(__file__).parent / "support"))

if "TRITON_INTERPRET" in os.environ:
    from fuseport_testing.interpreter import remember_builtins

    remember_builtins()

if TYPE_CHECKING:
    from fuseport_testing import command
    from fuseport_testing.megatron_models import Run

MegatronRuns = Callable[..., "Run"]


def pytest_report_header() -> str:
    """Say what a run leaves out for want of a browser."""
    from fuseport_testing.browser import find_browser

    found = find_browser()
    return f"browser: {found or 'none: tests marked browser are skipped (Debian: chromium)'}"


@pytest.fixture(scope="session")
def megatron_run(tmp_path_factory: pytest.TempPathFactory) -> MegatronRuns:
    """`megatron_run(case_name, tp=1, pp=1)` → the run, saved in all of the case's layouts.

    Each combination is made once a session. Skips where Megatron-Core is not installed.
    """
    pytest.importorskip("megatron.core")
    from fuseport_testing.megatron_models import BY_NAME, run_workers

    runs: dict[tuple[str, int, int], Run] = {}

    def get(name: str, tp: int = 1, pp: int = 1) -> Run:
        if (name, tp, pp) not in runs:
            case = BY_NAME[name]
            out_dir = tmp_path_factory.mktemp(f"{name}_tp{tp}_pp{pp}")
            runs[name, tp, pp] = run_workers(case, tp, pp, out_dir, case.layouts)
        return runs[name, tp, pp]

    return get


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[command.Run]:
    """The command line, in this process."""
    from fuseport_testing.command import WIDTH, check

    from fuseport.converter import cli
    from fuseport.converter.stops import STOPS

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    handlers = {number: signal.getsignal(number) for number in STOPS}

    def here(*args: object, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fuseport", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        # JSON is for programs, which have no width.
        check(status, int(ended.value.code or 0), "" if "--json" in args else out, err)
        return out, err

    yield here
    for number, handler in handlers.items():
        signal.signal(number, handler)
