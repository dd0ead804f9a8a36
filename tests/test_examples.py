"""The examples run as they stand, on small models."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fuseport_testing.pages import ROOT
from fuseport_testing.tiny import write_tiny

from fuseport.converter import verify_checkpoint

EXAMPLES = ROOT / "examples"


def in_a_process(name: str, *words: object) -> str:
    """For what sets up process groups and silences warnings."""
    command = (sys.executable, str(EXAMPLES / name), *map(str, words))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs an example in this process, where torch is imported already."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_end_of_a_training_script(tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core")
    out = tmp_path / "trained"
    assert "35 tensors" in in_a_process("export_after_training.py", out)
    assert verify_checkpoint(out).tensors == 35


def test_an_offline_conversion(here: Callable[..., str], tmp_path: Path) -> None:
    source, out = write_tiny(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(SystemExit, match=r"convert_offline.py CHECKPOINT OUT"):
        here("convert_offline.py", source)
    said = here("convert_offline.py", source, out)
    assert said.count("verified:") == 2
    for name in ("trtllm", "hf-fp8"):
        verify_checkpoint(out / name, source)


def test_a_refit_loop(here: Callable[..., str]) -> None:
    scales = [float(word) for word in re.findall(r"scale ([\d.]+)", here("refit_loop.py"))]
    # A step takes a fifth off every parameter: lr 0.1 times the gradient of the square.
    assert scales[1] == pytest.approx(0.8 * scales[0], rel=0.01)
    assert scales[2] == pytest.approx(0.8 * scales[1], rel=0.01)


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{file.name}"' in text for file in EXAMPLES.glob("*.py"))
