"""The Python in the README and in the documentation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
REFIT = Path(__file__).parents[1] / "docs" / "refit.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code) == 1
    exec(code[0], {})
    assert capsys.readouterr().out == "torch.Size([12, 8])\n"


def test_the_refit_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", REFIT.read_text(), re.DOTALL)
    assert len(code) == 1
    names: dict[str, object] = {}
    exec(code[0], names)
    assert names["step"] == 1
