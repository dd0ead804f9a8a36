"""`fuseport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Facts, FamilyFile, Json, Quiet, SpecFile, Verbose
from .output import output


def inspect(
    path: Annotated[Path, typer.Argument(help="A source checkpoint, or a converted one.")],
    spec: SpecFile = None,
    fact: Facts = None,
    family: FamilyFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the facts, tensors and sizes of a source or of a result."""
    with output("inspect", json=json, quiet=quiet, verbose=verbose) as printer:
        from .. import answers, show
        from ..option_files import read_facts, read_family
        from ..read_manifest import is_result
        from ..sources.source import open_source

        facts, table = read_facts(spec, fact), read_family(family)
        if is_result(path):
            printer.say(*show.result_tables(path))
            printer.answer(answers.result(path))
            return
        source = open_source(path, family=table)
        model = show.spec_of(source, facts)
        printer.say(show.facts_table(model), show.source_table(source, every=verbose))
        printer.detail(*show.ignored_keys(source))
        printer.answer(answers.source(source, model))
