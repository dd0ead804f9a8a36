"""Run the suites: on a GPU at full size, elsewhere at toy size.

    python -m benchmarks.run [SUITE ...] [--results DIRECTORY] [--options=PYTEST_OPTIONS]

Suites: models, scaling, peers, fresh and host, which are the default; and by name kernels, one by
one, and export, which writes 40 GB to a disk.
Figures go to DIRECTORY/<card>.json, by default benchmarks/results on a GPU and nowhere on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEFAULT = ("models", "scaling", "peers", "fresh", "host")
SUITES = (*DEFAULT, "kernels", "export")
OPTIONS = (
    # The tests' own settings make warnings errors; peers have many.
    "-W", "ignore", "-q", "-rs", "--capture=no", "--benchmark-quiet", "--timeout=600",
    "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist",
)  # fmt: skip


def main() -> int:
    """Run; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--options", default="", help="further options for pytest")
    given = parser.parse_args()
    if unknown := set(given.suites) - set(SUITES):
        parser.error(f"no suite is called {', '.join(unknown)}; there are {', '.join(SUITES)}")
    suites = given.suites or DEFAULT
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # Must be chosen before the kernels are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    results = given.results or (HERE / "results" if on_gpu else None)
    os.environ["FUSEPORT_BENCH_COMMAND"] = shlex.join(["python", "-m", "benchmarks.run", *suites])
    files = [str(HERE / f"bench_{suite}.py") for suite in suites]
    where = [] if results is None else ["--results", str(results)]
    return int(pytest.main([*OPTIONS, *where, *shlex.split(given.options), *files]))


if __name__ == "__main__":
    sys.exit(main())
