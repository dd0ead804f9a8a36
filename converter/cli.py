"""The command line: the table of commands, and how each of them ends."""

from __future__ import annotations

import importlib.metadata
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .commands.bench import bench
from .commands.convert import convert
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.inspect import inspect
from .commands.output import errors
from .commands.verify import verify
from .errors import FuseportError
from .stops import Stopped, watch

COMMANDS = (convert, inspect, verify, doctor, demo, bench)

# Exit codes: 1 for what the user can mend, 128 + its number for a signal (130: Ctrl-C).
FAILED, SIGNALLED = 1, 128
NAME = "fuseport"

app = typer.Typer(
    name=NAME,
    help="Turn checkpoints of Megatron or Hugging Face into what serving engines load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {importlib.metadata.version(NAME)}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


@app.callback()
def _options(version: Version = False) -> None:
    """What can be asked without a command."""


@contextmanager
def _readable_errors() -> Iterator[None]:
    """One paragraph and an exit code instead of a traceback."""
    watch()
    try:
        yield
    except FuseportError as error:
        errors.print(f"[red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(FAILED)
    except Stopped as stopped:
        errors.print(f"stopped by {signal.Signals(stopped.number).name}{stopped.state}")
        sys.exit(SIGNALLED + stopped.number)


def main() -> None:
    """Entry point of the `fuseport` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in ASCII gets a ? for ×, and no error.
            stream.reconfigure(errors="replace")
    with _readable_errors():
        app(prog_name=NAME)
