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
from .fingerprint import Fingerprint
from .model import ModelSpec
from .recipe import Recipe
from .sources.source import Source
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
    source: Source,
    known: Mapping[str, object],
    results: Mapping[str, FileResult],
    directory: Path,
) -> dict[str, object]:
    """The manifest of a result.

    Args:
        source: where it came from.
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
            "path": source.origin.name, "kind": source.kind, "fingerprint": known["source"],
        },
        "recipe": known["recipe"],
        "spec": known["spec"],
        "ignored": dict(source.ignored),
        "saturated": lost(results, "saturated"),
        "nonfinite": lost(results, "nonfinite"),
        "files": files,
        "tensors": {name: result.tensors for name, result in results.items()},
    }  # fmt: skip


def lost(results: Mapping[str, FileResult], what: str) -> dict[str, int]:
    """Elements that saturated, or are not finite, by file and tensor."""
    return {
        f"{Path(file).stem}/{name}": count
        for file, result in results.items()
        for name, count in getattr(result, what).items()
    }
