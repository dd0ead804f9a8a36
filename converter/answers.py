"""What commands answer to programs: plain values for JSON. docs/command-line.md lists the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from .checkpoint import read_json
from .checkpoint_plan import CheckpointPlan
from .forecast import Forecast
from .model import ModelSpec
from .read_manifest import SETTINGS, read_manifest
from .report import Report
from .sources.source import Source
from .timings import Timings
from .trtllm_package import Loaded
from .verify import Verification

Answer = dict[str, object]


def source(opened: Source, spec: ModelSpec) -> Answer:
    """A source checkpoint: its facts and tensors."""
    tensors = [
        {
            "name": one.name,
            "shape": list(one.shape),
            "dtype": str(one.dtype).removeprefix("torch."),
            "bytes": one.nbytes,
        }
        for one in sorted(opened.stored.values(), key=lambda one: one.name)
    ]
    return {
        "ok": True,
        "kind": "source",
        "path": str(opened.origin),
        "format": opened.kind,
        "bytes": opened.nbytes,
        "facts": dataclasses.asdict(spec),
        "tensors": tensors,
        "ignored": dict(opened.ignored),
    }


def result(path: Path) -> Answer:
    """A converted checkpoint: its settings, its files, and what it was made of."""
    manifest = read_manifest(path)
    files = [
        {
            "name": name,
            "tensors": len(manifest["tensors"].get(name, ())),
            "bytes": entry["bytes"],
        }
        for name, entry in manifest["files"].items()
    ]
    return {
        "ok": True,
        "kind": "result",
        "path": str(path),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "settings": read_json(path / SETTINGS),
        "recipe": manifest["recipe"],
        "facts": manifest["spec"],
        "files": files,
    }


def _plan(plan: CheckpointPlan, out: Path, *, dry_run: bool) -> Answer:
    files = [
        {"name": image.name, "tensors": len(image.offsets), "bytes": image.nbytes}
        for image in plan.images.values()
    ]
    origin = plan.source
    return {
        "ok": True,
        "dry_run": dry_run,
        "out": str(out),
        "source": {"path": str(origin.origin), "format": origin.kind, "bytes": origin.nbytes},
        "recipe": dataclasses.asdict(plan.recipe),
        "bytes": plan.nbytes,
        "tensors": len(plan.tensors),
        "files": files,
        "warnings": list(plan.notes),
    }


def planned(plan: CheckpointPlan, out: Path, known: Forecast) -> Answer:
    """A dry run: the plan, and what carrying it out would take."""
    return _plan(plan, out, dry_run=True) | {"forecast": dataclasses.asdict(known)}


def converted(plan: CheckpointPlan, report: Report, times: Timings) -> Answer:
    """A conversion: the plan, what was lost, and how long it took."""
    return _plan(plan, report.out, dry_run=False) | {
        "saturated": dict(report.saturated),
        "nonfinite": dict(report.nonfinite),
        "relative_errors": dict(report.relative_errors),
        "snr_db": report.snr_db,
        "codes": dict(report.codes),
        "seconds": times.elapsed,
        "stages": {
            name: {"seconds": one.seconds, "bytes": one.nbytes}
            for name, one in times.stages.items()
        },
    }


def verified(out: Path, found: Verification, loaded: Loaded | None) -> Answer:
    """A passed verification: what was checked, and what became of the source's elements."""
    counts: Mapping[str, object] | None = None
    if found.accounting is not None:
        counts = dataclasses.asdict(found.accounting)
    return {
        "ok": True,
        "out": str(out),
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "accounting": counts,
        "tensorrt_llm": None if loaded is None else dataclasses.asdict(loaded),
    }
