"""The pages of the API's reference name everything public, and nothing that is not there.

Building them is `scripts/check docs`; this needs no mkdocs.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec

import pytest
from fuseport_testing.pages import ROOT

from fuseport import converter
from fuseport.converter import handover, megatron, refit, use_fuseport

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
NAMED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
# A kernels' module is public if the converter takes something from it.
KERNELS = {
    module
    for file in ROOT.glob("converter/**/*.py")
    for module in re.findall(r"^from (fuseport\.kernels\.\w+) import", file.read_text(), re.M)
}


def resolve(name: str) -> object:
    """The module, or what a module has by the last word."""
    module, _, last = name.rpartition(".")
    if find_spec(name.rpartition(".")[0]) is None:
        raise ImportError(name)
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return getattr(import_module(module), last)


@pytest.mark.parametrize("name", converter.__all__)
def test_every_public_name_of_the_converter(name: str) -> None:
    assert f"fuseport.converter.{name}" in NAMED


@pytest.mark.parametrize("name", megatron.__all__)
def test_every_name_of_the_drop_in(name: str) -> None:
    assert f"fuseport.converter.megatron.{name}" in NAMED


@pytest.mark.parametrize("module", sorted(KERNELS))
def test_every_public_module_of_the_kernels(module: str) -> None:
    assert module in NAMED


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_is_there_and_has_a_docstring(name: str) -> None:
    assert resolve(name).__doc__


def test_live_weights_are_there() -> None:
    found = {resolve(name) for name in NAMED}
    assert found >= {refit.Refit, handover, use_fuseport.use_fuseport}


def test_a_name_is_on_one_page() -> None:
    assert len(NAMED) == len(set(NAMED)) > 15


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if f"- {page}" not in navigation] == []
