"""The manifest of a converted checkpoint, read by someone who does not trust it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import MANIFEST, read_json
from .errors import VerificationError
from .manifest import FORMAT
from .targets.table import TARGETS
from .targets.target import Target

SETTINGS = "config.json"


def is_result(path: Path) -> bool:
    """True if a directory has a manifest, whatever it says."""
    return (path / MANIFEST).is_file()


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
        VerificationError: there is none, or it is not one of ours.
    """
    path = Path(out) / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise VerificationError(f"{path} is not a manifest of format {FORMAT}; convert again")
    with sane(path):
        for name, entry in manifest["files"].items():
            expect(Path(name).name == name, f"the file name {name!r}")
            expect(type(entry["bytes"]) is int and entry["bytes"] >= 0, f"the size of {name}")
            expect(isinstance(entry["xxh3_128"], str), f"the digest of {name}")
        expect(isinstance(manifest["recipe"], dict), "recipe")
        target = target_of(manifest)
        names = set(target.file_names(len(manifest["tensors"])))
        expect(set(manifest["tensors"]) == names, "the names of the weight files")
        needed, files = {*names, SETTINGS, *target.needed}, set(manifest["files"])
        expect(needed <= files <= needed | target.others, "the list of files")
        for name, digests in manifest["tensors"].items():
            expect(all(isinstance(one, str) for one in digests.values()), f"digests in {name}")
        expect(isinstance(manifest["spec"], dict), "spec")
    return manifest


def target_of(manifest: Mapping[str, Any]) -> Target:
    """A manifest's target."""
    name = str(manifest["recipe"].get("target"))
    if name not in TARGETS:
        raise VerificationError(f"the manifest's spec or recipe makes no sense (target {name!r})")
    return TARGETS[name]


def expect(fits: bool, what: str) -> None:
    """Raise ValueError, which `sane` makes an error about its file."""
    if not fits:
        raise ValueError(f"{what} makes no sense")


@contextmanager
def sane(path: Path) -> Iterator[None]:
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
