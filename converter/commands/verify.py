"""`fuseport verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet, Verbose
from .output import output


def verify(
    out: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    source: Annotated[
        Path | None, typer.Option(help="Derive every tensor again and compare bit for bit.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check digests and structure, and with --source every bit."""
    with output("verify", json=json, quiet=quiet, verbose=verbose) as printer:
        from .. import answers, show
        from ..verify import verify_checkpoint

        with printer.progress("verifying", show.verify_bytes(out, source)) as advance:
            result = verify_checkpoint(out, source, progress=advance)
        printer.say(show.verification_text(out, result))
        printer.detail(*show.result_tables(out))
        printer.answer(answers.verified(out, result))
