"""Make docs/images/report.png: `PYTHONPATH=tests/support python -m fuseport_testing.report_image`.

It converts the demo's checkpoint with a report, opens the page in a browser, and keeps a picture of
it, with the titles of its sections in the picture's own metadata.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops, PngImagePlugin

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint
from fuseport.converter.demo import write_demo_checkpoint
from fuseport.converter.page.write import write_report
from fuseport.converter.timings import Timings

from .browser import find_browser, screenshot

IMAGE = Path(__file__).parents[3] / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1040, 3000
KEY = "Sections"


def make_report(directory: Path) -> Path:
    """The page about a demo's conversion below a directory."""
    os.chdir(directory)
    write_demo_checkpoint(Path("megatron"))
    plan = plan_checkpoint(Path("megatron"), Recipe(tp_size=2, quant="fp8-row"))
    times = Timings()
    report = convert_checkpoint(plan, Path("trtllm"), measure=True, timings=times)
    times.stop()
    Path("report").mkdir()
    return write_report(Path("report"), plan, report, times)


def titles(html: str) -> list[str]:
    """The titles of a page's sections."""
    return re.findall(r"<h2[^>]*>(.*?)</h2>", html)


def cut(image: Path) -> Image.Image:
    """A screenshot without the blank end of the page."""
    picture = Image.open(image).convert("RGB")
    blank = Image.new("RGB", picture.size, "white")
    box = ImageChops.difference(picture, blank).getbbox()
    assert box is not None
    return picture.crop((0, 0, picture.width, box[3] + 20))


def shrink(picture: Image.Image, out: Path, sections: list[str]) -> None:
    """Keep 128 colours, and the titles of the sections."""
    words = PngImagePlugin.PngInfo()
    words.add_text(KEY, "\n".join(sections))
    small = picture.quantize(128, dither=Image.Dither.NONE)
    small.save(out, optimize=True, pnginfo=words)


def main() -> None:
    """Make the picture."""
    browser = find_browser()
    if browser is None:
        sys.exit("no chromium on PATH (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as name:
        page = make_report(Path(name))
        shot = Path(name) / "shot.png"
        screenshot(page, shot, width=WIDTH, height=HEIGHT, browser=browser)
        IMAGE.parent.mkdir(exist_ok=True)
        shrink(cut(shot), IMAGE, titles(page.read_text()))
    print(f"{IMAGE}: {IMAGE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
