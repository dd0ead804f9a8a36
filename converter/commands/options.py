"""Options that several commands have, and values that a shell can complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="YAML file of model facts that replace the source's.")
]
Facts = Annotated[
    list[str] | None,
    typer.Option("--fact", metavar="NAME=VALUE", help="One model fact; may be repeated."),
]
FamilyFile = Annotated[
    Path | None,
    typer.Option("--family", help="YAML table of an architecture in the Hugging Face layout."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, and nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")
]
HostMemory = Annotated[str, typer.Option(help="Most private memory of the process.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more details.")]


def words(known: Sequence[str]) -> Callable[[], list[str]]:
    """What a shell offers for an option; typer leaves out what does not begin as typed."""
    return lambda: list(known)


def listed(known: Sequence[str]) -> str:
    """Words for a help text: "a, b or c"."""
    return f"{', '.join(known[:-1])} or {known[-1]}"
