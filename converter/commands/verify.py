"""`fuseport verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import HostMemory, Json, Quiet, Verbose
from .output import output


def verify(
    out: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    source: Annotated[
        Path | None, typer.Option(help="Derive every tensor again and compare bit for bit.")
    ] = None,
    with_tensorrt_llm: Annotated[
        bool,
        typer.Option(
            "--with-tensorrt-llm", help="Load it with the installed TensorRT-LLM's own code, too."
        ),
    ] = False,
    host_memory: HostMemory = "2GiB",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check digests and structure, and with --source every bit."""
    with output("verify", json=json, quiet=quiet, verbose=verbose) as printer:
        from .. import answers, show
        from ..limits import Limits, parse_size
        from ..read_manifest import read_manifest
        from ..trtllm_package import load_with_package, needed_version
        from ..verify import verify_checkpoint

        target = str(read_manifest(out)["recipe"]["target"])
        if with_tensorrt_llm:
            # What is missing is said before a long verification.
            needed_version(target)
        limits = Limits(host_memory=parse_size(host_memory))
        with printer.progress("verifying", show.verify_bytes(out, source)) as advance:
            result = verify_checkpoint(out, source, limits=limits, progress=advance)
        printer.say(show.verification_text(out, result))
        printer.detail(*show.result_tables(out))
        loaded = load_with_package(out, target) if with_tensorrt_llm else None
        if loaded is not None:
            printer.say(show.loaded_text(loaded))
        printer.answer(answers.verified(out, result, loaded))
