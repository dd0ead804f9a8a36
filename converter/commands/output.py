"""Who is told what: people, more or less of it, or a program."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from ..bars import progress
from ..errors import FuseportError

errors = Console(stderr=True)


@dataclass(frozen=True)
class Output:
    """Where a command's words go: `console` is silent where nobody is to read them."""

    command: str
    console: Console
    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def say(self, *parts: RenderableType) -> None:
        """Tell people."""
        if self.console.quiet:
            # It would lay out every row all the same, which takes a millisecond each.
            return
        for part in parts:
            self.console.print(part)

    def detail(self, *parts: RenderableType) -> None:
        """Tell people who want to know more."""
        if self.verbose:
            self.say(*parts)

    def warn(self, *texts: str) -> None:
        """Tell everybody, on the standard error: also those who read JSON or want to be quiet."""
        for text in texts:
            errors.print(f"[yellow]warning[/]: {escape(text)}", highlight=False, soft_wrap=True)

    def answer(self, values: Mapping[str, object]) -> None:
        """Tell a program, if one listens: the first of several processes does."""
        if self.json and os.environ.get("RANK", "0") == "0":
            version = importlib.metadata.version("fuseport")
            print(json.dumps({"fuseport": version, "command": self.command, **values}, indent=2))

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar, or now and then a line; the function that advances it by bytes."""
        return progress(self.console, label, total)


@contextmanager
def output(
    command: str, *, json: bool = False, quiet: bool = False, verbose: bool = False
) -> Iterator[Output]:
    """A command's output. Its error becomes the JSON's answer too.

    Raises:
        BadParameter: to be quiet and verbose at the same time.
    """
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose cannot be had together")
    found = Output(command, Console(quiet=quiet or json), json, quiet, verbose)
    try:
        yield found
    except FuseportError as error:
        found.answer({"ok": False, "error": type(error).__name__, "message": str(error)})
        raise
