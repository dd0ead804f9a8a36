"""`fuseport demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .convert import convert
from .inspect import inspect
from .verify import verify


def demo(
    directory: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("out/demo"),
    tp: Annotated[int, typer.Option(help="Tensor parallel size of the target.")] = 2,
) -> None:
    """Write a small Megatron checkpoint, convert it, verify it, and show what happened."""
    from ..demo import write_demo_checkpoint

    console = Console()
    source, out = directory / "megatron", directory / "trtllm"
    console.rule("a small Llama, as Megatron-Core saves it (torch_dist)")
    write_demo_checkpoint(source)
    inspect(source)
    console.rule(f"fuseport convert {source} {out} --tp {tp}")
    convert(source, out, tp=tp, overwrite=True)
    console.rule(f"fuseport inspect {out}")
    inspect(out)
    console.rule(f"fuseport verify {out} --source {source}")
    verify(out, source)
