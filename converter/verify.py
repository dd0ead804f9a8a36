"""Is a converted checkpoint what it should be?

Three questions, each stricter than the one before: are the bytes those that were written
(digests), are they what the format asks for (structure), and, given the source, is every tensor
bit for bit what pure torch makes of it, with every source element accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fuseport.kernels.reference import fused_copy_ref

from .checkpoint import file_digest, file_digest_of, read_image, read_json, tensor_digests
from .checkpoint_plan import CheckpointPlan, plan_checkpoint
from .coverage import uses
from .derive import BATCH, derive
from .errors import FuseportError, VerificationError
from .given import GIVEN
from .model import ModelSpec
from .plan import batches
from .read_manifest import SETTINGS, expect, read_manifest, sane, target_of
from .recipe import Recipe

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


def verify_checkpoint(
    out: Path, source: Path | None = None, *, progress: Progress = lambda nbytes: None
) -> Verification:
    """Verify a converted checkpoint.

    Args:
        out: the converted directory, with its manifest.
        source: the checkpoint it was made from: every tensor is then derived again in plain torch
            and compared.
        progress: called with the number of bytes checked since the last call.

    Raises:
        VerificationError: names the first file or tensor that differs.
        FuseportError: the source cannot be read, or does not fit the manifest.
    """
    out = Path(out)
    manifest = read_manifest(out)
    tensors = _check_files(out, manifest, progress)
    _check_structure(out, manifest)
    accounting = None
    if source is not None:
        plan = _plan_again(source, manifest)
        for name, values in plan.settings().items():
            _same_settings(out / name, values)
        _compare(out, plan, progress)
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


def _plan_again(source: Path, manifest: Mapping[str, Any]) -> CheckpointPlan:
    try:
        spec, recipe = ModelSpec.from_json(manifest["spec"]), Recipe(**manifest["recipe"])
    except (KeyError, TypeError, ValueError, FuseportError) as error:
        raise VerificationError(
            f"the manifest's spec or recipe makes no sense ({error}); convert again"
        ) from error
    return plan_checkpoint(source, recipe, spec)


def _compare(out: Path, plan: CheckpointPlan, progress: Progress) -> None:
    """Derive every tensor in plain torch and compare bits."""
    for batch in batches(plan.tensors, BATCH):
        results = derive(batch, plan.stored, fused_copy_ref, torch.device("cpu"))
        for planned, expected in zip(batch, results, strict=True):
            file = plan.images[planned.rank].name
            with _opened(out / file) as opened:
                found = opened.get_tensor(planned.name)
            _same(f"{file}: {planned.name}", found, expected)
            progress(planned.nbytes)


def _same_settings(path: Path, expected: Mapping[str, object]) -> None:
    found = read_json(path)
    for name in {**expected, **found}:
        if name not in found or name not in expected or found[name] != expected[name]:
            raise VerificationError(
                f"{path}: {name} is {found.get(name)!r}, the source and the recipe make it "
                f"{expected.get(name)!r}; convert again"
            )


def _same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise VerificationError(
            f"{name} is {found.dtype} {list(found.shape)}, the source makes it "
            f"{expected.dtype} {list(expected.shape)}"
        )
    # Flat first: a scalar has no bytes to view.
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (found, expected))
    if (bits := torch.ne(one, other)).any():
        first = int(bits.nonzero()[0]) // expected.element_size()
        index = [int(i) for i in np.unravel_index(first, tuple(expected.shape))]
        raise VerificationError(
            f"{name}{index} is {found.flatten()[first].item()}, the source makes it "
            f"{expected.flatten()[first].item()}; convert again"
        )


def account(plan: CheckpointPlan) -> Accounting:
    """Every source element is used once, repeated, or dropped for a reason that is known.

    Raises:
        VerificationError: elements of a tensor are used nowhere, without a reason.
    """
    sizes = {key: one.numel for key, one in plan.stored.items() if one.name != GIVEN}
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
