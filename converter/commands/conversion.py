"""What `fuseport convert` does with its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .. import answers, show
from ..backend import default_device
from ..bars import size
from ..checkpoint_plan import CheckpointPlan, plan_checkpoint
from ..convert import convert_checkpoint
from ..forecast import check_destination, forecast
from ..group import Group, joined
from ..limits import Limits
from ..recipe import Recipe
from ..stops import leaving
from ..timings import Timings
from .output import Output


@dataclass(frozen=True)
class Options:
    """How a plan is carried out: `convert_checkpoint`'s arguments of these names."""

    backend: str
    device: str
    overwrite: bool
    resume: bool
    assets: Path | None
    measure: bool
    check_source: bool
    limits: Limits


def carry_out(
    source: Path, out: Path, recipe: Recipe, facts: Mapping[str, object], options: Options,
    printer: Output, *, dry_run: bool, timings: bool,
) -> None:  # fmt: skip
    """Plan, say so, and convert, alone or as one of several processes."""
    with leaving("; OUT is as it was"), joined() as group:
        if group.rank:
            printer = dataclasses.replace(printer, console=Console(quiet=True), json=False)
        plan = plan_checkpoint(source, recipe, facts)
        if not group.rank:
            printer.warn(*plan.notes)
        printer.say(show.plan_table(plan))
        printer.detail(show.facts_table(plan.spec), *show.ignored_keys(plan.source))
        if dry_run:
            _forecast(plan, out, options, group, printer)
        else:
            _convert(plan, out, options, group, printer, timings)


def _forecast(
    plan: CheckpointPlan, out: Path, options: Options, group: Group, printer: Output
) -> None:
    """Say what a conversion would take."""
    check_destination(plan, out, overwrite=options.overwrite)
    known = forecast(plan, options.limits, options.device, group.size)
    printer.say(show.forecast_text(known))
    printer.answer(answers.planned(plan, out, known))


def _convert(
    plan: CheckpointPlan, out: Path, options: Options, group: Group, printer: Output,
    timings: bool,
) -> None:  # fmt: skip
    """Convert with a bar and a report."""
    times, device = Timings(), default_device(options.device)
    printer.detail(f"on {device}; windows of at most {size(options.limits.window(device))}")
    with printer.progress("converting", plan.nbytes) as advance:
        report = convert_checkpoint(
            plan, out, timings=times, progress=advance, group=group, **vars(options)
        )
    printer.say(show.report_text(report))
    if not group.rank:
        printer.warn(*show.losses(report))
    (printer.say if timings else printer.detail)(show.timings_table(times))
    printer.answer(answers.converted(plan, report, times))
