"""The report in a real browser, and beside the picture of it in the documentation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fuseport_testing import browser
from fuseport_testing.report_image import HEIGHT, IMAGE, KEY, WIDTH, make_report, shrink, titles
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's report, as the documentation shows it."""
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return make_report(directory).resolve()


def test_the_documentation_shows_this_page(report: Path) -> None:
    found = titles(report.read_text())
    with Image.open(IMAGE) as image:
        assert found == image.info[KEY].splitlines()
    assert found == re.findall(r"^\| ([A-Z].*?) \|", DOCS.read_text(), re.MULTILINE)
    assert IMAGE.stat().st_size < 150_000


@pytest.mark.browser
def test_a_browser_shows_it(report: Path, tmp_path: Path) -> None:
    chromium = browser.need_browser()
    shot, kept = tmp_path / "shot.png", tmp_path / "kept.png"
    browser.screenshot(report, shot, width=WIDTH, height=HEIGHT, browser=chromium)
    shrink(shot, kept, titles(report.read_text()))
    with Image.open(kept) as here, Image.open(IMAGE) as there:
        assert here.width == there.width == WIDTH
        # Fonts and times may differ between machines, but not much.
        assert abs(here.height - there.height) < 0.1 * there.height
    # Light, and the pictures are drawn: each of the palette's first colours is there.
    counts = colours_of(shot)
    assert max(counts, key=lambda colour: counts[colour]) == (255, 255, 255)
    for colour in ((0, 114, 178), (230, 159, 0), (0, 158, 115)):
        assert counts[colour] > 1000


def colours_of(image: Path) -> Counter[tuple[int, ...]]:
    """How many pixels there are of each colour."""
    pixels = np.asarray(Image.open(image).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return Counter(dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True)))


@pytest.mark.browser
def test_a_browser_reads_it_as_it_is_meant(report: Path, tmp_path: Path) -> None:
    chromium = browser.need_browser()
    seen = browser.browse(report, "--dump-dom", browser=chromium, profile=tmp_path / "profile")
    assert titles(seen) == titles(report.read_text())
    assert seen.count("<img ") == 4
    assert "Signal to noise of all of them together: 31.6" in seen
