"""`fuseport bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from ..bars import size
from ..tables import titled
from .options import Json, Quiet
from .output import output

if TYPE_CHECKING:
    from ..bench import Bench, Seen

COLUMNS = (
    "a first call plans, and compiles what is not cached; further ones use its plan again: of the "
    "copy's rate they have the share in the last column"
)
NO_GPU = (
    "[yellow]no GPU here[/]: these are toy sizes in plain torch, and say nothing of what a GPU does"
)


def bench(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: some layers in memory beside a plain copy, bits compared first."""
    with output("bench", json=json, quiet=quiet) as printer:
        import torch

        from ..backend import default_device
        from ..bench import prepare

        made = prepare(default_device(device))
        seen = list(made.schemes())
        printer.say(bench_table(made, seen))
        printer.say(f"[dim]torch {torch.__version__}; {COLUMNS}[/]")
        if made.device.type != "cuda":
            printer.say(NO_GPU)
        printer.answer({"ok": True, "schemes": [dataclasses.asdict(one) for one in seen]})


def bench_table(bench: Bench, seen: Iterable[Seen]) -> Group:
    """What a machine did: a row a scheme."""
    title = (
        f"{bench.spec.num_layers} layers of a Llama-like model, {size(bench.nbytes)}, on "
        f"{bench.place}; a plain copy there: {size(bench.copy)}/s (bytes read and bytes written)"
    )
    columns = ("", "bytes", "first call", "kept plan", "of the copy")
    table = Table(*columns)
    for one in seen:
        times = (f"{1e3 * one.first:.1f} ms", f"{1e3 * one.kept:.2f} ms")
        table.add_row(one.scheme, size(one.nbytes), *times, f"{100 * one.share:.0f}%")
    return titled(title, table)
