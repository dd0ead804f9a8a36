"""Is a converted checkpoint what it should be?

Three questions, each stricter than the one before: are the bytes those that were written
(digests), are they what the format asks for (structure), and, given the source, is every tensor
bit for bit what pure torch makes of it, with every source element accounted for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .arguments import check_run, result_path
from .checkpoint import (
    DTYPE_NAMES,
    file_digest,
    file_digest_of,
    read_image,
    read_json,
    tensor_digests,
)
from .checkpoint_plan import CheckpointPlan, plan_checkpoint
from .coverage import uses
from .errors import FuseportError, VerificationError
from .given import GIVEN
from .limits import Limits
from .model import ModelSpec
from .plan import Planned, storage_key
from .read_manifest import SETTINGS, expect, read_manifest, sane, target_of
from .recipe import Recipe
from .rederive import Piece, Rederive, read_view
from .sources.stored import FileRange, Stored, close_files
from .sources.stored import Piece as Box
from .state import PADDING

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Accounting:
    """Source elements by what became of them.

    `dropped` names the tensors of which elements were left out on purpose, with how many.
    """

    once: int = 0
    repeated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What was checked. `accounting` is None unless the source was given."""

    files: int
    tensors: int
    nbytes: int
    accounting: Accounting | None


# Threads fill memory that is made here, and a mode is one thread's.
@torch.inference_mode(False)
@torch.no_grad()
def verify_checkpoint(
    out: str | Path,
    source: str | Path | None = None,
    *,
    limits: Limits | None = None,
    progress: Progress = lambda nbytes: None,
) -> Verification:
    """Verify a converted checkpoint.

    Args:
        out: the converted directory, with its manifest.
        source: the checkpoint it was made from: every tensor is then derived again in plain torch
            and compared.
        limits: of which `host_memory` bounds the process's private memory.
        progress: called with the number of bytes checked since the last call.

    Raises:
        VerificationError: names the first file or tensor that differs.
        FuseportError: the source cannot be read, or does not fit the manifest.
    """
    check_run(progress, limits=limits)
    out = result_path(out)
    manifest = read_manifest(out)
    tensors = _check_files(out, manifest, progress)
    _check_structure(out, manifest)
    accounting = None
    if source is not None:
        plan = _plan_again(source, manifest)
        for name, values in plan.settings().items():
            _same_settings(out / name, values)
        try:
            _compare(out, plan, limits or Limits(), progress)
        finally:
            # The result may be moved, or its file system be taken away.
            close_files()
        accounting = account(plan)
    nbytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return Verification(len(manifest["files"]), tensors, nbytes, accounting)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    with sane(path), safe_open(path, "pt") as opened:
        yield opened


def _check_files(out: Path, manifest: Mapping[str, Any], progress: Progress) -> int:
    """Every file's digest, and with it every tensor's; the number of tensors."""
    count = 0
    for name, entry in manifest["files"].items():
        path = out / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing; convert again")
        if path.stat().st_size != entry["bytes"]:
            raise VerificationError(
                f"{path} has {path.stat().st_size} bytes, expected {entry['bytes']}; convert again"
            )
        if name in manifest["tensors"]:
            count += _check_tensors(path, entry, manifest["tensors"][name], progress)
        elif file_digest(path) != entry["xxh3_128"]:
            raise VerificationError(
                f"{path} has other bytes than when it was written; convert again"
            )
    return count


def _check_tensors(
    path: Path, entry: Mapping[str, Any], tensors: Mapping[str, str], progress: Progress
) -> int:
    image = read_image(path)
    if set(image.offsets) != set(tensors):
        raise VerificationError(f"{path} does not hold the manifest's tensors")
    found = tensor_digests(path, image, progress)
    changed = [name for name in found if found[name] != tensors[name]]
    if file_digest_of(image, found) != entry["xxh3_128"]:
        where = f"tensor {changed[0]}" if changed else "its header"
        raise VerificationError(
            f"{path} has other bytes than when it was written ({where}); convert again"
        )
    if changed:
        raise VerificationError(f"{path}: tensor {changed[0]} was changed")
    return len(found)


def _check_structure(out: Path, manifest: Mapping[str, Any]) -> None:
    path = out / SETTINGS
    settings = read_json(path)
    target = target_of(manifest)
    missing = [name for name in target.required if settings.get(name) is None]
    if missing:
        raise VerificationError(f"{path} lacks {', '.join(missing)}; convert again")
    counts = [len(digests) for digests in manifest["tensors"].values()]
    with sane(path):
        layers = settings["num_hidden_layers"]
        expect(0 < layers <= sum(counts), f"num_hidden_layers = {layers}")
        shapes = target.expected(settings, out, len(counts))
    for file, expected in shapes.items():
        with _opened(out / file) as opened:
            names = set(opened.keys())
            for name, shape in expected.items():
                if name not in names:
                    raise VerificationError(f"{file} lacks {name} {list(shape)}")
                found = tuple(opened.get_slice(name).get_shape())
                if found != shape:
                    raise VerificationError(
                        f"{file}: {name} is {list(found)}, config.json calls for {list(shape)}"
                    )


def _plan_again(source: str | Path, manifest: Mapping[str, Any]) -> CheckpointPlan:
    try:
        spec, recipe = ModelSpec.from_json(manifest["spec"]), Recipe(**manifest["recipe"])
    except (KeyError, TypeError, ValueError, FuseportError) as error:
        raise VerificationError(
            f"the manifest's spec or recipe makes no sense ({error}); convert again"
        ) from error
    return plan_checkpoint(source, recipe, spec)


def _compare(out: Path, plan: CheckpointPlan, limits: Limits, progress: Progress) -> None:
    """Derive every tensor in plain torch and compare bits."""
    files = _result(out, plan)
    again = Rederive(plan.tensors, plan.stored, limits)
    missing = {storage_key(one.dst): one.dst.numel() for one in plan.tensors}
    for planned in plan.tensors:
        for piece in again.pieces(planned):
            key = storage_key(piece.planned.dst)
            found = read_view(files[key], piece.view, piece.view.numel())
            _same(files[key].name, piece, found)
            missing[key] -= piece.view.numel()
            progress(piece.expected.nbytes)
    if left := [one.name for one in plan.tensors if missing[storage_key(one.dst)]]:
        raise VerificationError(f"the plan does not fill {left[0]} once; please report this")


def _result(out: Path, plan: CheckpointPlan) -> dict[int, Stored]:
    """The result's tensors by the storage of their planned ones; they are what was planned."""
    found: dict[int, Stored] = {}
    planned: dict[int, list[Planned]] = {}
    for one in plan.tensors:
        planned.setdefault(one.rank, []).append(one)
    for number, tensors in planned.items():
        path = out / plan.images[number].name
        image = read_image(path)
        entries = json.loads(image.header[8:])
        for one in tensors:
            name, shape = f"{path.name}: {one.name}", tuple(one.dst.shape)
            _check_kind(name, entries.get(one.name, {}), one)
            place = FileRange(path, image.offsets[one.name])
            box = Box((0,) * len(shape), shape, place)
            found[storage_key(one.dst)] = Stored(name, shape, one.dst.dtype, (box,))
    return found


def _check_kind(name: str, entry: Mapping[str, Any], planned: Planned) -> None:
    found = entry.get("dtype"), entry.get("shape")
    expected = DTYPE_NAMES[planned.dst.dtype], list(planned.dst.shape)
    if found != expected:
        raise VerificationError(
            f"{name} is {found[0]} {found[1]}, the source makes it {expected[0]} {expected[1]}"
        )


def _same_settings(path: Path, expected: Mapping[str, object]) -> None:
    found = read_json(path)
    for name in {**expected, **found}:
        if name not in found or name not in expected or found[name] != expected[name]:
            raise VerificationError(
                f"{path}: {name} is {found.get(name)!r}, the source and the recipe make it "
                f"{expected.get(name)!r}; convert again"
            )


def _same(name: str, piece: Piece, found: torch.Tensor) -> None:
    # Flat first: a scalar has no bytes to view.
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (found, piece.expected))
    if (bits := torch.ne(one, other)).any():
        first = int(bits.nonzero()[0]) // found.element_size()
        steps = np.unravel_index(first, tuple(piece.view.shape))
        place = piece.view.storage_offset() + sum(map(mul, steps, piece.view.stride()))
        index = [int(i) for i in np.unravel_index(int(place), tuple(piece.planned.dst.shape))]
        raise VerificationError(
            f"{name}{index} is {found.flatten()[first].item()}, the source makes it "
            f"{piece.expected.flatten()[first].item()}; convert again"
        )


def account(plan: CheckpointPlan) -> Accounting:
    """Every source element is used once, repeated, or dropped for a reason that is known.

    Raises:
        VerificationError: elements of a tensor are used nowhere, without a reason.
    """
    made = (GIVEN, PADDING)
    sizes = {key: one.numel for key, one in plan.stored.items() if one.name not in made}
    padding = plan.padding_rows()
    once = repeated = 0
    dropped: dict[str, int] = {}
    for key, counts in uses(plan.tensors, sizes).items():
        name = plan.stored[key].name
        unused = counts.pop(0, 0)
        if unused > padding.get(name, 0):
            raise VerificationError(f"{unused} elements of {name} are used by no target tensor")
        dropped |= {name: unused} if unused else {}
        once += counts.pop(1, 0)
        repeated += sum(counts.values())
    return Accounting(once, repeated, dropped)
