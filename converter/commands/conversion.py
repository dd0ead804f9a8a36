"""What `fuseport convert` does with its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .. import answers, show
from ..backend import default_device
from ..bars import size
from ..checkpoint_plan import CheckpointPlan, plan_checkpoint
from ..convert import convert_checkpoint
from ..errors import RecipeError
from ..forecast import check_destination, forecast
from ..group import Group, joined, shares
from ..limits import Limits
from ..page.write import check_report, write_report
from ..recipe import Recipe
from ..report import Report
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


@dataclass(frozen=True)
class Wanted:
    """What is to be done with a plan beside converting it, and what is to be shown."""

    dry_run: bool
    timings: bool
    report: Path | None


def carry_out(
    source: Path, out: Path, recipe: Recipe, facts: Mapping[str, object], options: Options,
    wanted: Wanted, printer: Output,
) -> None:  # fmt: skip
    """Plan, say so, and convert, alone or as one of several processes."""
    if wanted.report is not None:
        options = _with_report(wanted, options, {"OUT": out, "the source": source})
    with joined() as group, leaving("; OUT is as it was"):
        if group.rank:
            printer = dataclasses.replace(printer, console=Console(quiet=True))
        plan = plan_checkpoint(source, recipe, facts)
        if not group.rank:
            printer.warn(*plan.notes)
        printer.say(show.plan_table(plan))
        printer.detail(show.facts_table(plan.spec), *show.ignored_keys(plan.source))
        if wanted.dry_run:
            _forecast(plan, out, options, group, printer)
            return
        report, times = _convert(plan, out, options, group, printer)
    if not group.rank:
        _tell(plan, report, times, wanted, printer)


def _with_report(wanted: Wanted, options: Options, apart: Mapping[str, Path]) -> Options:
    """The options that a report needs; looks first if it can be written."""
    assert wanted.report is not None
    if wanted.dry_run:
        raise RecipeError("--report tells of a conversion; leave out --dry-run")
    check_report(wanted.report, apart)
    return dataclasses.replace(options, measure=True)


def _forecast(
    plan: CheckpointPlan, out: Path, options: Options, group: Group, printer: Output
) -> None:
    """Say what a conversion would take."""
    check_destination(plan, out, overwrite=options.overwrite)
    known = forecast(plan, options.limits, options.device, group.size)
    printer.say(show.forecast_text(known))
    printer.answer(answers.planned(plan, out, known))


def _convert(
    plan: CheckpointPlan, out: Path, options: Options, group: Group, printer: Output
) -> tuple[Report, Timings]:
    """Convert with a bar."""
    times, device = Timings(), default_device(options.device)
    printer.detail(f"on {device}; windows of at most {size(options.limits.window(device))}")
    with printer.progress("converting", own_bytes(plan, group)) as advance:
        report = convert_checkpoint(
            plan, out, timings=times, progress=advance, group=group, **vars(options)
        )
        times.stop()
    return report, times


def own_bytes(plan: CheckpointPlan, group: Group) -> int:
    """Target bytes that fall to this process, if no file is there yet."""
    sizes = {number: image.nbytes for number, image in plan.images.items()}
    mine = shares(sizes, group.size)[group.rank]
    return sum(planned.nbytes for planned in plan.tensors if planned.rank in mine)


def _tell(
    plan: CheckpointPlan, report: Report, times: Timings, wanted: Wanted, printer: Output
) -> None:
    """Say what was done."""
    printer.say(show.report_text(report))
    printer.warn(*show.losses(report))
    (printer.say if wanted.timings else printer.detail)(show.timings_table(times))
    if wanted.report is not None:
        page = write_report(wanted.report, plan, report, times)
        printer.say(f"report: {escape(str(page))}")
    printer.answer(answers.converted(plan, report, times))
