"""The plots, from made-up figures in a temporary directory: none of these was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def row(case: str, way: str, scheme: str = "bf16", **more: Any) -> dict[str, Any]:
    empty = {"nbytes": 1, "seconds": 0.5, "spread": 0.0, "rounds": 1, "share": 0.5, "details": {}}
    return {"case": case, "scheme": scheme, "way": way, **empty, **more}


def section(*rows: dict[str, Any]) -> dict[str, Any]:
    versions = {"torch": "0.1", "triton": "0.2"}
    return {"date": "1999-12-31", "command": "made up", "versions": versions, "rows": list(rows)}


SUITES = {
    "peers": section(
        row("dense rank", "fuseport", share=0.97),
        row("dense rank", "eager", share=0.13),
        row("expert rank", "fuseport", "block", share=0.89),
    ),
    "models": section(
        row("a model", "first call", details={"plan": 0.2, "tables": 0.1, "launch": 0.05}),
        row("a model", "warm launch"),
    ),
    "export": section(
        row("to disk, 8 files", "fuseport", details={"busy kernel": 1.0, "busy write": 2.0}),
        row("to disk", "another", share=None, details={"first_call": 3.0}),
    ),
    "scaling": section(
        *(
            row(f"dense, {n} GB", "warm launch", seconds=n, details={"source_bytes": n * 1e9})
            for n in (1, 4)
        ),
        row("dense, hidden size 64", "first call", details={"tensors": 120}),
        row("llama-3-8b to tp 8", "first call", details={"tp": 8}),
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a card with all suites, and of one with a single suite."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("plots")
    cards = {"a-card": SUITES, "one-suite": {"peers": SUITES["peers"]}}
    for name, suites in cards.items():
        text = json.dumps({"card": "A Card 9000", "suites": suites})
        (directory / f"{name}.json").write_text(text)
    files = [str(directory / f"{name}.json") for name in cards]
    out = directory / "images"
    command = [sys.executable, "-m", "benchmarks.plots", *files, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


def drawn(images: Path, card: str) -> dict[str, str]:
    """Plot → the SVG's text."""
    made = {path.name for path in images.glob(f"{card}-*")}
    plots = {name.split("-")[-1].split(".")[0] for name in made}
    assert made == {f"{card}-{plot}.{end}" for plot in plots for end in ("svg", "png")}
    return {plot: (images / f"{card}-{plot}.svg").read_text() for plot in plots}


def test_every_figure_has_its_place_and_its_source(images: Path) -> None:
    plots = drawn(images, "a-card")
    assert set(plots) == {"peers", "stages", "scaling"}
    for text in plots.values():
        assert "A Card 9000, torch 0.1, triton 0.2, 1999-12-31, `made up`" in text
    for word in ("0.97", "0.13", "0.89", "expert rank", "eager", "128 × 128 scales"):
        assert word in plots["peers"]
    for word in ("a model", "tables", "to disk, 8 files", "write", "stages overlap"):
        assert word in plots["stages"]
    assert "another" not in plots["stages"]
    for word in ("warm launch", "first call", "tensor parallel size"):
        assert word in plots["scaling"]


def test_what_was_not_measured_is_not_drawn(images: Path) -> None:
    assert set(drawn(images, "one-suite")) == {"peers"}
