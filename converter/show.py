"""Tables, bars and sentences for people."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .bars import size
from .checkpoint import read_json
from .checkpoint_plan import CheckpointPlan
from .doctor import Finding
from .forecast import Forecast
from .model import ModelSpec
from .read_manifest import SETTINGS, read_manifest
from .report import Report
from .sources.source import Source
from .sources.stored import Shape, Stored
from .tables import names, titled
from .timings import Timings
from .trtllm_package import Loaded
from .verify import Verification

# A layer or an expert, also as Transformer Engine's grouped experts have it: `weight7`.
_NUMBER = re.compile(r"(\.(?:weight|bias)?)\d+(?=\.|$)")
_Row = tuple[str, Shape, torch.dtype]


def plan_table(plan: CheckpointPlan) -> Group:
    """What will be written: a row a file."""
    recipe = plan.recipe
    split = f" tp {recipe.tp_size} × pp {recipe.pp_size}" if recipe.world_size > 1 else ""
    title = (
        f"{plan.source.kind} {size(plan.source.nbytes)} → {recipe.target}{split}, {recipe.dtype}, "
        f"{size(plan.nbytes)}"
    )
    table = Table(names("file"), "tensors", "size")
    for image in plan.images.values():
        table.add_row(image.name, str(len(image.offsets)), size(image.nbytes))
    return titled(title, table)


def report_text(report: Report) -> str:
    """One paragraph about a finished conversion."""
    lines = [f"wrote {escape(str(report.out))}: {report.tensors} tensors, {size(report.nbytes)}"]
    if report.codes:
        lines.append(
            f"of the source's quantised weights {report.codes['kept']} are kept as they are, "
            f"{report.codes['dequantised']} are dequantised first"
        )
    lines += _error_text(report.relative_errors, report.snr_db)
    return "\n".join(lines)


def losses(report: Report) -> Iterator[str]:
    """What a user should be told about values that were lost: a sentence each."""
    for what, counts in (
        ("exceed their format", report.saturated),
        ("are NaN or Inf", report.nonfinite),
    ):
        if counts:
            worst = max(counts, key=lambda name: counts[name])
            yield (
                f"{sum(counts.values())} values in {len(counts)} tensors {what}, most in {worst} "
                f"({counts[worst]})"
            )


def forecast_text(known: Forecast) -> str:
    """What a conversion would take."""
    minutes, seconds = divmod(math.ceil(known.seconds), 60)
    gpu = f", {size(known.gpu_peak)} on the GPU" if known.gpu_peak else ""
    return (
        f"reads {size(known.read)}, writes {size(known.written)}; at most {size(known.host_peak)} "
        f"of the host's memory{gpu} for each process; about {minutes} min {seconds} s\n"
        f"[dim]the time is a guess from a short trial on this machine[/]"
    )


def timings_table(timings: Timings) -> Group:
    """How long each stage was busy, over all its threads."""
    title = f"busy times (they overlap; the run took {timings.elapsed:.1f} s)"
    table = Table("stage", "seconds", "size", "GB/s")
    for name, stage in timings.stages.items():
        speed = f"{stage.nbytes / stage.seconds / 1e9:.2f}" if stage.seconds else ""
        table.add_row(name, f"{stage.seconds:.2f}", size(stage.nbytes), speed)
    return titled(title, table)


def _error_text(errors: Mapping[str, float], snr: float | None) -> Iterator[str]:
    """What quantisation costs, where it was measured."""
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        ratio = "nothing lost" if snr is None else f"signal to noise {snr:.2f} dB"
        yield (
            f"quantisation: {ratio} over {len(errors)} weights; largest relative error "
            f"{errors[worst]:.4f} in {escape(worst)}"
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


def loaded_text(loaded: Loaded) -> str:
    """What TensorRT-LLM took."""
    return (
        f"[green]loaded[/] by TensorRT-LLM {loaded.version}: {loaded.ranks} ranks, "
        f"{loaded.parameters} parameters"
    )


def verify_bytes(out: Path, source: Path | None) -> int:
    """Bytes that a verification goes through."""
    total = sum(entry["bytes"] for entry in read_manifest(out)["files"].values())
    return int(total) * (1 if source is None else 2)


def spec_of(source: Source, facts: Mapping[str, Any]) -> ModelSpec:
    """A source's facts, replaced by given ones."""
    return ModelSpec.from_facts(source.facts, **facts)


def facts_table(spec: ModelSpec) -> Group:
    """A model's facts, without those that are absent."""
    table = Table("fact", "value")
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value not in (None, (), 0, False):
            table.add_row(field.name, escape(str(value)))
    return titled("model", table)


def ignored_keys(source: Source) -> Iterator[Table]:
    """The keys of a source that are no weights, if there are any."""
    if source.ignored:
        table = Table(names("ignored key"), "why")
        for name, reason in source.ignored.items():
            table.add_row(escape(name), escape(reason))
        yield table


def source_table(source: Source, *, every: bool) -> Group:
    """A source's tensors: a row for those of all layers and experts, or for every one."""
    title = f"{escape(str(source.origin))} ({source.kind}): {size(source.nbytes)}"
    table = Table(names("tensor"), "shape", "dtype", "tensors", "size")
    for (name, shape, dtype), same in _rows(source, every).items():
        table.add_row(
            escape(name if len(same) > 1 else same[0].name),
            " × ".join(map(str, shape)),
            str(dtype).removeprefix("torch."),
            str(len(same)),
            size(sum(one.nbytes for one in same)),
        )
    reasons = Counter(source.ignored.values())
    table.caption = "; ".join(f"{count} keys ignored: {why}" for why, count in reasons.items())
    return titled(title, table)


def _rows(source: Source, every: bool) -> dict[_Row, list[Stored]]:
    """Tensors by name, shape and dtype; `*` stands for the numbers of layers and experts."""
    rows: dict[_Row, list[Stored]] = defaultdict(list)
    for one in sorted(source.stored.values(), key=lambda one: one.name):
        name = one.name if every else _NUMBER.sub(r"\1*", one.name)
        rows[name, one.shape, one.dtype].append(one)
    return rows


def result_tables(path: Path) -> Iterator[RenderableType]:
    """A result's settings and files."""
    manifest = read_manifest(path)
    settings = Table(SETTINGS, "value")
    for name, value in read_json(path / SETTINGS).items():
        settings.add_row(escape(name), escape(json.dumps(value)))
    yield titled(escape(str(path)), settings)
    files = Table(names("file"), "tensors", "size")
    for name, entry in manifest["files"].items():
        files.add_row(
            escape(name), str(len(manifest["tensors"].get(name, ()))), size(entry["bytes"])
        )
    yield files


_MARKS = {"ok": "[green]ok[/]", "absent": "–", "note": "[yellow]note[/]", "fails": "[red]fails[/]"}


def findings_table(findings: Sequence[Finding]) -> Group:
    """What `doctor` found: a row each, with advice below."""
    table = Table("", "topic", "found")
    for one in findings:
        advice = f"\n[yellow]{escape(one.advice)}[/]" if one.advice else ""
        table.add_row(_MARKS[one.state], one.topic, escape(one.found) + advice)
    return titled("this machine", table)
