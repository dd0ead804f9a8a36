"""What the suites share: the device, the copy, and `timed`, which measures one way."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import Run, clock, copy_rate, default_device, extra_memory, launches, machine
from .results import Row, save
from .work import Case, Work

# Bytes of the copy: on a GPU more than any cache holds.
COPY_BYTES = {"cuda": 4 << 30, "cpu": 8 << 20}
RESULTS = pytest.StashKey["Bench"]()


def give_back() -> None:
    """What nobody holds any more leaves the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Bench:
    """One session: the device, the copy's rate and the rows by suite."""

    def __init__(self, directory: Path | None, launches: bool) -> None:
        self.directory, self.launches = directory, launches
        self.device = default_device()
        self.rate = 0.0
        self.rows: dict[str, list[Row]] = {}

    @property
    def is_toy(self) -> bool:
        """Toy sizes, so that the suites can be run anywhere."""
        return self.device.type == "cpu"

    def measure_copy(self) -> None:
        """Measure the copy anew: before the weights take the memory."""
        give_back()
        self.rate = copy_rate(self.device, COPY_BYTES[self.device.type])
        give_back()

    def own(self, suite: str, case: str, scheme: str) -> float | None:
        """Seconds of fuseport's warm launch on the same work, if it was measured."""
        keys = ((row.case, row.scheme, row.way, row.seconds) for row in self.rows.get(suite, ()))
        found = [s for c, q, way, s in keys if (c, q) == (case, scheme) and way == "fuseport"]
        return found[0] if found else None

    def add(self, suite: str, row: Row) -> None:
        """Keep a row, show it, and record all: a run that is cut short has not been for nothing."""
        self.rows.setdefault(suite, []).append(row)
        print(f"\n{row.line()}", end=" ", flush=True)
        self.record([])

    def record(self, failed: Sequence[str]) -> None:
        """Write the rows, and the names of the tests that failed, to the card's file."""
        if self.directory is not None and self.rows:
            command = os.environ.get("FUSEPORT_BENCH_COMMAND", "python -m pytest benchmarks")
            save(self.directory, self.rows, command, failed)


def checked(
    bench: Bench, case: Case, scheme: str, wanted: Callable[[str], bool] = lambda name: True
) -> Work:
    """Weights and a plan that gives what the reference gives: without that there is no figure."""
    bench.measure_copy()
    work = Work(case, scheme, bench.device, wanted)
    if not work.is_equal():
        pytest.fail("RED: not equal to the reference; no figure")
    return work


class Timed:
    """Measures one way of doing some work, by pytest-benchmark's fixture."""

    def __init__(self, benchmark: BenchmarkFixture, bench: Bench, suite: str) -> None:
        self.benchmark, self.bench, self.suite = benchmark, bench, suite

    def __call__(
        self, case: str, scheme: str, way: str, nbytes: int, run: Run,
        details: Mapping[str, float] = MappingProxyType({}), *, rounds: int = 20, warmup: int = 3,
    ) -> Row:  # fmt: skip
        """Run it, look at its memory, time it, look at its launches, and keep the row."""
        run()
        extra, toy = extra_memory(run), self.bench.is_toy
        # The last round's result, so that it is given back outside of the time.
        held: list[object] = []
        self.benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda: held.append(run()),
            setup=held.clear,
            rounds=2 if toy else rounds,
            warmup_rounds=0 if toy else warmup,
        )
        held.clear()
        assert self.benchmark.stats is not None
        times = self.benchmark.stats.stats
        own = self.bench.own(self.suite, case, scheme)
        row = Row(
            case, scheme, way, nbytes, times.median, times.iqr, len(times.data),
            nbytes / times.median / self.bench.rate,
            launches(run) if self.bench.launches else None, extra,
            times.median / own if own else None, self.bench.rate, dict(details),
        )  # fmt: skip
        self.bench.add(self.suite, row)
        return row


def pytest_addoption(parser: pytest.Parser) -> None:
    """--results, --launches, --directory."""
    parser.addoption("--results", type=Path, help="directory of <card>.json; by default none")
    parser.addoption(
        "--launches", action="store_true", help="count launches by a profiler, which slows the rest"
    )
    parser.addoption("--directory", type=Path, help="where checkpoints are written")


def pytest_configure(config: pytest.Config) -> None:
    """One session's rows."""
    config.stash[RESULTS] = Bench(config.getoption("--results"), config.getoption("--launches"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One clock for all."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """The session's device and rows."""
    made = request.config.stash[RESULTS]
    # What the libraries made on import never goes; looking it through each time takes minutes.
    gc.collect()
    gc.freeze()
    print(f"\n{machine()}")
    made.measure_copy()
    print(f"copy {made.rate / 1e9:.0f} GB/s", end="")
    return made


@pytest.fixture
def timed(benchmark: BenchmarkFixture, bench: Bench, request: pytest.FixtureRequest) -> Timed:
    """Measures one way; the suite is the file's name."""
    return Timed(benchmark, bench, request.path.stem.removeprefix("bench_"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Record what failed, too: a check of a work fails before its tests begin."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = {} if reporter is None else reporter.stats
    reports = [*stats.get("failed", ()), *stats.get("error", ())]
    session.config.stash[RESULTS].record([report.nodeid for report in reports])


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """Memory of one measurement does not stay for the next."""
    yield
    give_back()
