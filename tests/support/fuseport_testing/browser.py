"""A real browser without a window: Debian's `chromium`, or whichever is on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Set to 1 where a browser must be there, so that nothing is skipped.
REQUIRED = "FUSEPORT_NEEDS_BROWSER"


def find_browser() -> str | None:
    """The browser's path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def need_browser() -> str:
    """The browser's path; skips where there is none, and fails where one is required."""
    if (found := find_browser()) is not None:
        return found
    text = "no chromium on PATH (Debian: apt-get install chromium)"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(text)
    pytest.skip(text)


def browse(page: Path, *options: str, browser: str, profile: Path) -> str:
    """Open a page without a network; what the browser prints."""
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", *options,
        page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(page: Path, image: Path, *, width: int, height: int, browser: str) -> None:
    """A picture of the page's first `height` pixels."""
    size = f"--window-size={width},{height}"
    profile = image.with_name("profile")
    browse(page, size, f"--screenshot={image}", browser=browser, profile=profile)
    shutil.rmtree(profile)
