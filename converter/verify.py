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
import xxhash
from safetensors import safe_open

from fuseport.kernels.reference import fused_copy_ref

from .checkpoint import MANIFEST, file_digest, raw_bytes, read_json
from .convert import BATCH, CheckpointPlan, compute, plan_checkpoint
from .coverage import uses
from .errors import FuseportError, VerificationError
from .given import GIVEN
from .model import ModelSpec
from .plan import batches
from .recipe import Recipe
from .targets.table import TARGETS
from .targets.target import Target

Progress = Callable[[int], None]
FORMAT, SETTINGS = 1, "config.json"


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
    _check_files(out, manifest)
    tensors = _check_digests(out, manifest, progress)
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


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
        VerificationError: there is none, or it is not one of ours.
    """
    path = Path(out) / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise VerificationError(f"{path} is not a manifest of format {FORMAT}; convert again")
    with _sane(path):
        for name, entry in manifest["files"].items():
            _expect(Path(name).name == name, f"the file name {name!r}")
            _expect(type(entry["bytes"]) is int and entry["bytes"] >= 0, f"the size of {name}")
            _expect(isinstance(entry["xxh3_128"], str), f"the digest of {name}")
        _expect(isinstance(manifest["recipe"], dict), "recipe")
        target = target_of(manifest)
        names = set(target.file_names(len(manifest["tensors"])))
        _expect(set(manifest["tensors"]) == names, "the names of the weight files")
        needed, files = {*names, SETTINGS, *target.needed}, set(manifest["files"])
        _expect(needed <= files <= needed | target.others, "the list of files")
        for name, digests in manifest["tensors"].items():
            _expect(all(isinstance(one, str) for one in digests.values()), f"digests in {name}")
        _expect(isinstance(manifest["spec"], dict), "spec")
    return manifest


def target_of(manifest: Mapping[str, Any]) -> Target:
    """A manifest's target."""
    name = str(manifest["recipe"].get("target"))
    if name not in TARGETS:
        raise VerificationError(f"the manifest's spec or recipe makes no sense (target {name!r})")
    return TARGETS[name]


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} makes no sense")


@contextmanager
def _sane(path: Path) -> Iterator[None]:
    """What values of the wrong kind raise, as an error about the file that they came from."""
    try:
        yield
    except VerificationError:
        raise
    except KeyError as error:
        raise VerificationError(f"{path} lacks {error}; convert again") from error
    # safetensors and torch have errors of their own for a damaged file.
    except Exception as error:
        raise VerificationError(f"{path} is damaged: {error}; convert again") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    with _sane(path), safe_open(path, "pt") as opened:
        yield opened


def _check_files(out: Path, manifest: Mapping[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        path = out / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing; convert again")
        if path.stat().st_size != entry["bytes"]:
            raise VerificationError(
                f"{path} has {path.stat().st_size} bytes, expected {entry['bytes']}; convert again"
            )
        if file_digest(path) != entry["xxh3_128"]:
            raise VerificationError(
                f"{path} has other bytes than when it was written{_where(path, manifest)}; "
                f"convert again"
            )


def _where(path: Path, manifest: Mapping[str, Any]) -> str:
    """Which tensor of a damaged file differs, if its header can still be read."""
    digests = manifest["tensors"].get(path.name, {})
    try:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if digest(opened.get_tensor(name)) != digests.get(name):
                    return f" (tensor {name})"
    except Exception:
        return " (its header is damaged)"
    return ""


def digest(tensor: torch.Tensor) -> str:
    """xxh3_128 of a contiguous CPU tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor))


def _check_digests(out: Path, manifest: Mapping[str, Any], progress: Progress) -> int:
    count = 0
    for file, digests in manifest["tensors"].items():
        with _opened(out / file) as opened:
            names = set(opened.keys())
            if names != set(digests):
                raise VerificationError(f"{out / file} does not hold the manifest's tensors")
            for name in digests:
                tensor = opened.get_tensor(name)
                if digest(tensor) != digests[name]:
                    raise VerificationError(f"{out / file}: tensor {name} was changed")
                progress(tensor.nbytes)
                count += 1
    return count


def _check_structure(out: Path, manifest: Mapping[str, Any]) -> None:
    path = out / SETTINGS
    settings = read_json(path)
    target = target_of(manifest)
    missing = [name for name in target.required if settings.get(name) is None]
    if missing:
        raise VerificationError(f"{path} lacks {', '.join(missing)}; convert again")
    counts = [len(digests) for digests in manifest["tensors"].values()]
    with _sane(path):
        layers = settings["num_hidden_layers"]
        _expect(0 < layers <= sum(counts), f"num_hidden_layers = {layers}")
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
        results, _ = compute(batch, plan.stored, fused_copy_ref, torch.device("cpu"))
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
