"""The report in a real browser, and beside the picture of it in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fuseport_testing import browser
from fuseport_testing.report_image import HEIGHT, IMAGE, KEY, WIDTH, cut, make_report, titles
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
    shot = tmp_path / "shot.png"
    browser.screenshot(report, shot, width=WIDTH, height=HEIGHT, browser=chromium)
    here = cut(shot)
    with Image.open(IMAGE) as there:
        assert here.width == there.width == WIDTH
        # Fonts and times may differ between machines, but not much.
        assert abs(here.height - there.height) < 0.1 * there.height
    # Light, and the pictures are drawn: each of the palette's first colours is there.
    pixels = np.asarray(here)
    assert np.mean(pixels == 255) > 0.6
    for colour in ((0, 114, 178), (230, 159, 0), (0, 158, 115)):
        assert np.count_nonzero((pixels == colour).all(-1)) > 1000


@pytest.mark.browser
def test_a_browser_reads_it_as_it_is_meant(report: Path, tmp_path: Path) -> None:
    chromium = browser.need_browser()
    seen = browser.browse(report, "--dump-dom", browser=chromium, profile=tmp_path / "profile")
    assert titles(seen) == titles(report.read_text())
    assert seen.count("<img ") == 4
    assert "Signal to noise of all of them together: 31.6" in seen
