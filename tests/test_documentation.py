"""Every block of code in the documentation runs as it stands, and every link leads somewhere.

A page's blocks run in order, in a directory with the checkpoints that pages name. `text` is what
cannot run here: against an engine, on several GPUs, or for hours.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fuseport_testing.command import Run
from fuseport_testing.pages import PAGES, ROOT, Block, blocks, commands, write_sources
from torch.distributed.run import parse_args

WITH_CODE = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    write_sources(directory)
    return directory


class Reader:
    """Someone who types a page's blocks in."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names: dict[str, object] = {"__name__": "page"}

    def read(self, block: Block) -> None:
        kinds = {"python": self.python, "sh": self.shell, "json": self.data, "yaml": self.data}
        assert block.language in kinds, f"no way to run a block of {block.language!r}"
        kinds[block.language](block)

    def python(self, block: Block) -> None:
        exec(block.text, self.names)

    def shell(self, block: Block) -> None:
        tools: dict[str, Callable[..., object]] = {
            "fuseport": self.run,
            "make": _make,
            "torchrun": self._torchrun,
        }
        for program, *words in commands(block.text):
            tools[program](*words)

    def data(self, block: Block) -> None:
        parse = json.loads if block.language == "json" else yaml.safe_load
        assert parse(block.text)
        if block.file is not None:
            Path(block.file).write_text(block.text)

    def _torchrun(self, *words: str) -> None:
        """What each process runs, by one alone; `test_processes.py` has several."""
        options = parse_args(list(words))
        assert options.no_python
        assert options.training_script == "fuseport"
        self.run(*options.training_script_args)


def _make(target: str) -> None:
    """The targets themselves are run by whoever runs these tests."""
    subprocess.run(("make", "--dry-run", target), cwd=ROOT, check=True, capture_output=True)


@pytest.mark.filterwarnings("ignore::fuseport.converter.errors.FuseportWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_runs(
    page: Path, sources: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in sources.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    reader = Reader(run)
    for block in blocks(page):
        if block.language != "text":
            reader.read(block)


def test_blocks_are_found() -> None:
    """As many fences are opened as blocks are found, so that none is left out."""
    for page in PAGES:
        assert len(re.findall(r"^ *(```|~~~)", page.read_text(), re.M)) == 2 * len(blocks(page))
    assert len(WITH_CODE) > 5


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


def broken(page: Path, link: str) -> bool:
    """Whether a relative link leads nowhere, or out of the repository."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return True
    return bool(anchor) and anchor not in anchors(target)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = ["".join(found) for found in _LINK.findall(page.read_text())]
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in inside if broken(page, link)] == []


@pytest.mark.parametrize("link", ["docs/none.md", "docs/refit.md#none", "../other.md", "#none"])
def test_a_broken_link_is_found(link: str) -> None:
    assert broken(ROOT / "README.md", link)
