"""A report's directory: one page that holds everything, and its pictures as files too."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..bars import size
from ..checkpoint_plan import CheckpointPlan
from ..errors import MissingPackageError, OutputError
from ..recipe import Recipe
from ..report import Report
from ..timings import Timings
from . import page
from .facts import error_grid, sizes
from .journey import Journey, journey
from .page import Section
from .roles import Atlas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
# Rows of a table of losses: the largest ones.
_WORST = 20


def check_report(directory: Path, apart: Mapping[str, Path]) -> None:
    """What can be known before a conversion: is there something to draw with, and a place?

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: the directory is, or is within, one of `apart`, or cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "--report draws with matplotlib, which is not installed: pip install 'fuseport[report]'"
        )
    real = directory.resolve()
    for what, other in apart.items():
        if real.is_relative_to(other.resolve()):
            raise OutputError(f"--report {directory} is within {what}; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--report {directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise OutputError(f"--report {directory} cannot be written; choose another directory")


def write_report(directory: Path, plan: CheckpointPlan, report: Report, times: Timings) -> Path:
    """Write the page and its pictures; the page.

    Raises:
        OutputError: a file cannot be written.
    """
    atlas = Atlas(plan)
    pictures: dict[str, bytes] = {}
    sections = [
        _summary(plan, report, times),
        _journey(journey(plan, atlas), pictures),
        _sizes(plan, atlas, pictures),
        _errors(plan, atlas, report, pictures),
        _losses(report),
        _stages(times, pictures),
    ]
    title = f"{plan.source.origin.name} → {report.out.name}"
    version = importlib.metadata.version("fuseport")
    whole = page.page(title, f"Converted by fuseport {version}", sections)
    try:
        for name, png in pictures.items():
            (directory / name).write_bytes(png)
        (directory / PAGE).write_text(whole, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{report.out} is converted, but --report {directory} cannot be written: "
            f"{error.strerror}"
        ) from error
    return directory / PAGE


def _keep(pictures: dict[str, bytes], name: str, figure: Figure, words: str) -> str:
    """A figure as a file and as a piece of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pictures[f"{name}.png"] = buffer.getvalue()
    return page.picture(buffer.getvalue(), words)


def _summary(plan: CheckpointPlan, report: Report, times: Timings) -> Section:
    recipe, usual = plan.recipe, Recipe()
    chosen = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(recipe, field.name) != getattr(usual, field.name)
    }
    source, model = plan.source, plan.spec
    facts: dict[str, object] = {
        "source": f"{source.origin} ({source.kind}, {size(source.nbytes)})",
        "result": f"{report.out} ({recipe.target}, {size(report.nbytes)})",
        "files": f"{len(plan.images)}, with {report.tensors} tensors",
        "model": f"{model.model_type}, {model.num_layers} layers, hidden size {model.hidden_size}",
        "recipe": ", ".join(f"{n} = {v}" for n, v in chosen.items() if n != "family") or "as usual",
        "time": f"{times.elapsed:.1f} s",
    }
    if report.codes:
        facts["quantised weights of the source"] = ", ".join(
            f"{count} {what}" for what, count in report.codes.items()
        )
    warnings = [page.text(note, "warning") for note in plan.notes]
    return Section("summary", "Summary", [page.pairs(facts), *warnings])


def _journey(way: Journey, pictures: dict[str, bytes]) -> Section:
    from .draw import draw_journey

    words = (
        f"Layer {way.layer} (of {way.layers}, counted from 0): rows and columns of the source on "
        f"the left, those of the target's files on the right. A colour is a part of the model, and "
        f"paler for later files."
    )
    more = []
    if way.alike:
        more.append(f"{way.alike} more tensors of the layer go the same way.")
    if way.norms:
        more.append(f"{way.norms} norms and vectors are left out.")
    image = _keep(pictures, "journey", draw_journey(way), words)
    return Section(
        "journey", "What went where", [page.text(words), image, page.text(" ".join(more), "pale")]
    )


def _sizes(plan: CheckpointPlan, atlas: Atlas, pictures: dict[str, bytes]) -> Section:
    from .charts import draw_sizes

    words = (
        "Bytes of the source's tensors, and of the target's over all files: with scales, padding, "
        "and what several ranks hold alike."
    )
    image = _keep(pictures, "sizes", draw_sizes(sizes(plan, atlas)), words)
    return Section("sizes", "Bytes by kind", [page.text(words), image])


def _errors(
    plan: CheckpointPlan, atlas: Atlas, report: Report, pictures: dict[str, bytes]
) -> Section:
    grid = error_grid(plan, atlas, report.relative_errors)
    if not grid.values:
        what = "No weight was quantised here, so there is no error to show."
        return Section("errors", "Quantisation error", [page.text(what)])
    from .charts import draw_errors

    ratio = "nothing was lost" if report.snr_db is None else f"{report.snr_db:.2f} dB"
    words = (
        f"√(Σ(x − x̂)² / Σx²) of each quantised weight; the largest over ranks and experts. Signal "
        f"to noise of all of them together: {ratio}."
    )
    image = _keep(pictures, "errors", draw_errors(grid), words)
    return Section("errors", "Quantisation error", [page.text(words), image])


def _losses(report: Report) -> Section:
    parts = []
    for what, counts in (
        ("exceed their format and are saturated", report.saturated),
        ("are NaN or Inf", report.nonfinite),
    ):
        if not counts:
            parts.append(page.text(f"No values {what}."))
            continue
        total = f"{sum(counts.values()):,} values in {len(counts)} tensors {what}."
        worst = sorted(counts.items(), key=lambda one: -one[1])
        parts += [page.text(total, "warning"), page.table(("tensor", "values"), worst[:_WORST])]
        if len(worst) > _WORST:
            parts.append(page.text(f"… and {len(worst) - _WORST} more, in the manifest.", "pale"))
    return Section("losses", "Saturated and non-finite values", parts)


def _stages(times: Timings, pictures: dict[str, bytes]) -> Section:
    from .charts import draw_stages

    words = (
        "How busy each stage was, in threads, over the run's seconds. Stages overlap. A GPU's own "
        "times are noted a little later than they were. Of several processes, this is the first."
    )
    image = _keep(pictures, "stages", draw_stages(times), words)
    rows = [
        (name, one.seconds, size(one.nbytes), one.nbytes / max(one.seconds, 1e-9) / 1e9)
        for name, one in times.stages.items()
        if one.seconds or one.nbytes
    ]
    table = page.table(("stage", "busy seconds", "size", "GB/s"), rows)
    return Section("stages", "Stages", [page.text(words), image, table])
