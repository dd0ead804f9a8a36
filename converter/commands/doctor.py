"""`fuseport doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet
from .output import output


def doctor(
    path: Annotated[Path, typer.Argument(help="Where results are to be written.")] = Path("."),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what this machine has, and try a small conversion. Exits with 1 if that fails."""
    with output("doctor", json=json, quiet=quiet) as printer:
        from ..doctor import examine
        from ..show import findings_table

        findings = examine(path)
        works = all(one.state != "fails" for one in findings)
        printer.say(findings_table(findings))
        printer.answer({"ok": works, "findings": [dataclasses.asdict(one) for one in findings]})
        if not works:
            raise typer.Exit(1)
