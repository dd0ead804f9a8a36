"""Tables, bars and sentences for people."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from .bench import Bench, Seen
from .checkpoint import MANIFEST, read_json
from .checkpoint_plan import CheckpointPlan
from .errors import FuseportError
from .forecast import Forecast
from .hf_family import Table as FamilyTable
from .model import ModelSpec
from .read_manifest import SETTINGS, read_manifest
from .report import Report
from .sources.source import Source, open_source
from .timings import Timings
from .verify import Verification


def size(nbytes: float) -> str:
    """Bytes for people: 17.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts bytes; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def plan_table(plan: CheckpointPlan) -> Table:
    """What will be written: a row a file."""
    recipe = plan.recipe
    split = f" tp {recipe.tp_size} × pp {recipe.pp_size}" if recipe.world_size > 1 else ""
    title = (
        f"{plan.source.kind} {size(plan.source.nbytes)} → {recipe.target}{split}, {recipe.dtype}, "
        f"{size(plan.nbytes)}"
    )
    table = Table("file", "tensors", "size", title=title, title_justify="left")
    for image in plan.images.values():
        table.add_row(image.name, str(len(image.offsets)), size(image.nbytes))
    return table


def notes(plan: CheckpointPlan) -> list[str]:
    """What a user should be told before anything is read: a line each."""
    return [f"[yellow]warning[/]: {escape(note)}" for note in plan.notes]


def report_text(report: Report) -> str:
    """One paragraph about a finished conversion."""
    lines = [f"wrote {escape(str(report.out))}: {report.tensors} tensors, {size(report.nbytes)}"]
    if report.codes:
        lines.append(
            f"of the source's quantised weights {report.codes['kept']} are kept as they are, "
            f"{report.codes['dequantised']} are dequantised first"
        )
    for what, counts in (
        ("exceed their format", report.saturated),
        ("are NaN or Inf", report.nonfinite),
    ):
        if counts:
            worst = max(counts, key=lambda name: counts[name])
            lines.append(
                f"[yellow]warning[/]: {sum(counts.values())} values in {len(counts)} tensors "
                f"{what}, most in {escape(worst)} ({counts[worst]})"
            )
    lines += _error_text(report.relative_errors, report.snr_db)
    return "\n".join(lines)


def forecast_text(known: Forecast) -> str:
    """What a conversion would take."""
    minutes, seconds = divmod(round(known.seconds), 60)
    gpu = f", {size(known.gpu_peak)} on the GPU" if known.gpu_peak else ""
    return (
        f"reads {size(known.read)}, writes {size(known.written)}; at most {size(known.host_peak)} "
        f"of the host's memory{gpu} for each process; about {minutes} min {seconds} s\n"
        f"[dim]the time is a guess from a short trial on this machine[/]"
    )


def timings_table(timings: Timings) -> Table:
    """How long each stage was busy, over all its threads."""
    title = f"busy times (they overlap; the run took {timings.elapsed:.1f} s)"
    table = Table("stage", "seconds", "size", "GB/s", title=title, title_justify="left")
    for name, stage in timings.stages.items():
        speed = f"{stage.nbytes / stage.seconds / 1e9:.2f}" if stage.seconds else ""
        table.add_row(name, f"{stage.seconds:.2f}", size(stage.nbytes), speed)
    return table


def json_report(out: Path, result: Verification | FuseportError) -> str:
    """A verification's result for programs: `verified`, then what was checked, or the error."""
    if isinstance(result, FuseportError):
        kind = type(result).__name__
        values: dict[str, object] = {"verified": False, "error": kind, "message": str(result)}
    else:
        values = {"verified": True, **dataclasses.asdict(result)}
    return json.dumps({"out": str(out), **values}, indent=2)


def _error_text(errors: Mapping[str, float], snr: float | None) -> Iterator[str]:
    """What quantisation costs, where it was measured."""
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        ratio = "nothing lost" if snr is None else f"signal to noise {snr:.2f} dB"
        yield (
            f"quantisation: {ratio} over {len(errors)} weights; largest relative error "
            f"{errors[worst]:.4f} in {escape(worst)}"
        )


def bench_table(bench: Bench, seen: Iterable[Seen]) -> Table:
    """What a machine did: a row a scheme."""
    device = bench.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, at toy size"
    title = (
        f"{bench.spec.num_layers} layers of a Llama-like model, {size(bench.nbytes)}, on {place}; "
        f"a copy there: {size(bench.copy)}/s (bytes are read and written ones)"
    )
    columns = ("", "bytes", "first call", "kept plan", "of the copy")
    table = Table(*columns, title=title, title_justify="left")
    for one in seen:
        times = (f"{1e3 * one.first:.1f} ms", f"{1e3 * one.kept:.2f} ms")
        table.add_row(one.scheme, size(one.nbytes), *times, f"{100 * one.share:.0f}%")
    return table


NO_GPU = (
    "[yellow]no GPU here[/]: these are toy sizes in plain torch, and say nothing of what a GPU does"
)


def verification_text(out: Path, result: Verification) -> str:
    """One paragraph about a passed verification."""
    lines = [
        f"[green]verified[/] {escape(str(out))}: {result.files} files, {result.tensors} tensors, "
        f"{size(result.nbytes)}: digests and structure"
    ]
    if result.accounting is not None:
        counts = result.accounting
        lines.append("every tensor equals the source's, bit for bit, derived again in plain torch")
        lines.append(
            f"source elements: {counts.once:,} used once, {counts.repeated:,} repeated (KV heads, "
            f"norms and embeddings on several ranks), {sum(counts.dropped.values()):,} dropped"
        )
        lines += [
            f"  dropped {n:,} of {escape(name)} (padding)" for name, n in counts.dropped.items()
        ]
    return "\n".join(lines)


def verify_bytes(out: Path, source: Path | None) -> int:
    """Bytes that a verification goes through."""
    total = sum(entry["bytes"] for entry in read_manifest(out)["files"].values())
    return int(total) * (1 if source is None else 2)


def inspection(
    path: Path, facts: Mapping[str, Any], family: FamilyTable | None = None
) -> Iterator[RenderableType]:
    """Tables about a source or a result."""
    if (path / MANIFEST).is_file():
        yield from _result(path)
        return
    source = open_source(path, family=family)
    yield _facts_table(ModelSpec.from_facts(source.facts, **facts))
    yield _source_table(source)


def _facts_table(spec: ModelSpec) -> Table:
    table = Table("fact", "value", title="model", title_justify="left")
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value not in (None, (), 0, False):
            table.add_row(field.name, escape(str(value)))
    return table


def _source_table(source: Source) -> Table:
    title = f"{escape(str(source.origin))} ({source.kind}): {size(source.nbytes)}"
    table = Table("tensor", "shape", "dtype", "size", title=title, title_justify="left")
    for stored in sorted(source.stored.values(), key=lambda one: one.name):
        shape = " × ".join(map(str, stored.shape))
        dtype = str(stored.dtype).removeprefix("torch.")
        table.add_row(escape(stored.name), shape, dtype, size(stored.nbytes))
    reasons: dict[str, int] = defaultdict(int)
    for reason in source.ignored.values():
        reasons[reason] += 1
    table.caption = "; ".join(f"{count} keys ignored: {why}" for why, count in reasons.items())
    return table


def _result(path: Path) -> Iterator[RenderableType]:
    manifest = read_manifest(path)
    settings = Table(SETTINGS, "value", title=escape(str(path)), title_justify="left")
    for name, value in read_json(path / SETTINGS).items():
        settings.add_row(escape(name), escape(json.dumps(value)))
    yield settings
    files = Table("file", "tensors", "size")
    for name, entry in manifest["files"].items():
        files.add_row(
            escape(name), str(len(manifest["tensors"].get(name, ()))), size(entry["bytes"])
        )
    yield files
