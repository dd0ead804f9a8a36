"""The command line for tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
from fuseport_testing.command import WIDTH, Run, check

from fuseport.converter import cli
from fuseport.converter.stops import STOPS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
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
