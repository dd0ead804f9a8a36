"""What messages tell users to do can be done, on the command line and in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuseport_testing.pages import ROOT
from typer.main import get_command

from fuseport.converter.cli import app

FILES = sorted([*ROOT.glob("converter/**/*.py"), *ROOT.glob("kernels/*.py")])
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Megatron-LM's own.
MEGATRONS = {"--ckpt-format"}
# What only the command line comes to.
COMMANDS = {"cli.py", "doctor.py", "option_files.py", "trtllm_package.py"}
# Option → what Python's users give, where it is not the same name.
PYTHON = {
    "--ep": "moe_ep_size",
    "--fact": "fact",
    "--spec": "fact",
    "--no-check-source": "check_source",
    "--parallel-embedding": "use_parallel_embedding",
}


def text(node: ast.expr) -> str:
    """A string's text; values that are put in are left out."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def strings(node: ast.AST) -> Iterator[str]:
    """All strings but docstrings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.JoinedStr, ast.Constant)):
            if not isinstance(node, ast.Expr):
                yield text(child)
        else:
            yield from strings(child)


def naming(file: Path) -> list[str]:
    """The strings of a file that name options."""
    return [one for one in strings(ast.parse(file.read_text())) if OPTION.search(one)]


def unexplained(message: str) -> list[str]:
    """The options that are not in brackets, behind what they are called in Python."""
    found = []
    for match in OPTION.finditer(message):
        before, bracket, within = message[: match.start()].rpartition("(")
        name = PYTHON.get(match[0], match[0].removeprefix("--").replace("-", "_"))
        if match[0] not in MEGATRONS and (not bracket or ")" in within or name not in before):
            found.append(match[0])
    return found


def test_every_option_that_a_message_names_is_there() -> None:
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {
        word
        for command in (get_command(app), *commands)
        for option in command.params
        for word in (*option.opts, *option.secondary_opts)
    }
    named = {word for file in FILES for one in naming(file) for word in OPTION.findall(one)}
    assert named - known == MEGATRONS
    assert len(named) > 15


@pytest.mark.parametrize("file", [file for file in FILES if naming(file)], ids=lambda f: f.name)
def test_a_message_says_it_to_pythons_users_too(file: Path) -> None:
    if file.name not in COMMANDS and file.parent.name not in ("commands", "page"):
        assert [one for one in naming(file) if unexplained(one)] == []


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("give scales (--scales FILE) or exclude ('*', --exclude)", []),
        ("give --scales", ["--scales"]),
        ("give it (--scales)", ["--scales"]),
        ("leave scales (or quant) out, or --scales", ["--scales"]),
    ],
)
def test_an_option_that_python_lacks_is_found(message: str, options: list[str]) -> None:
    assert unexplained(message) == options
