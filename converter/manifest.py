"""What decides on a result, and what is said about it: the manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from .checkpoint import FileImage, file_digest
from .checkpoint_plan import CheckpointPlan
from .fingerprint import Fingerprint
from .losses import Losses, place
from .model import ModelSpec
from .recipe import Recipe
from .stored_codes import tally
from .writer import FileResult

FORMAT = 1


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"fuseport": importlib.metadata.version("fuseport"), "torch": torch.__version__}


def identity(
    source: Fingerprint, spec: ModelSpec, recipe: Recipe, images: Mapping[int, FileImage]
) -> dict[str, object]:
    """All that decides on a result's bytes, as plain JSON: equal for equal runs."""
    layout = xxhash.xxh3_128()
    for number in sorted(images):
        layout.update(images[number].name.encode() + images[number].header)
    values = {
        "source": dict(source),
        "recipe": dataclasses.asdict(recipe),
        "spec": dataclasses.asdict(spec),
        "version": versions(),
        "layout": layout.hexdigest(),
    }
    plain: dict[str, object] = json.loads(json.dumps(values))
    return plain


def manifest(
    plan: CheckpointPlan,
    known: Mapping[str, object],
    results: Mapping[str, FileResult],
    directory: Path,
) -> dict[str, object]:
    """The manifest of a result.

    Args:
        plan: what was done.
        known: the run's `identity`.
        results: the weights' files by name.
        directory: where the result's files are; those that are no weights are digested here.
    """
    files: dict[str, object] = {}
    for path in sorted(one for one in directory.iterdir() if one.is_file()):
        found = results.get(path.name)
        digest = file_digest(path) if found is None else found.digest
        files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": digest}
    return {
        "format": FORMAT,
        **versions(),
        "source": {
            "path": plan.source.origin.name, "kind": plan.source.kind,
            "fingerprint": known["source"],
        },
        "recipe": known["recipe"],
        "spec": known["spec"],
        "ignored": dict(plan.source.ignored),
        **losses_of(results).summary(),
        "codes": tally(plan.stored),
        "notes": list(plan.notes),
        "files": files,
        "tensors": {name: result.tensors for name, result in results.items()},
    }  # fmt: skip


def losses_of(results: Mapping[str, FileResult]) -> Losses:
    """What was lost, by file and tensor."""
    losses = Losses()
    for file, result in results.items():
        for name, (beyond, strange, signal, noise) in result.lost.items():
            counts = int(beyond), int(strange)
            losses.add(place(file, name), counts, (signal, noise))
    return losses
