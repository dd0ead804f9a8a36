"""Finding the one iteration that a checkpoint path means, and naming formats not read here."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import CorruptSourceError, SourceError

_ITERATION = re.compile(r"iter_\d{7,}")
_MAX_JSON_BYTES = 1 << 20

_REFUSED = {
    "zarr": "a zarr checkpoint, which is not read here: load and save it again with Megatron's "
    "--ckpt-format torch_dist",
    "fsdp_dtensor": "an FSDP DTensor checkpoint, which is not read here: convert it to torch_dist "
    "with Megatron's checkpoint tools",
    "torch_dcp": "a torch_dcp checkpoint, which is not read here: save it again with "
    "--ckpt-format torch_dist",
}


def iteration_dir(path: Path) -> Path:
    """The iteration directory for `path`: itself, or the one its parent directory points to.

    Follows `latest_checkpointed_iteration.txt` (a number or `release`), else takes the highest
    `iter_*`. Raises SourceError if there is none.
    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory; give the checkpoint's directory")
    latest = path / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        return _latest(path, latest)
    iterations = [entry for entry in path.iterdir() if _ITERATION.fullmatch(entry.name)]
    if iterations:
        return max(iterations, key=lambda entry: int(entry.name[5:]))
    release = path / "release"
    return release if release.is_dir() else path


def _latest(path: Path, latest: Path) -> Path:
    with latest.open("rb") as file:
        word = file.read(64).decode("ascii", "replace").strip()
    if word != "release" and not re.fullmatch(r"[0-9]{1,18}", word):
        raise CorruptSourceError(f"{latest}: expected a number or 'release', found {word!r}")
    found = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not found.is_dir():
        raise SourceError(
            f"{latest} names {found.name}, which is not there: copy it, or give the directory "
            "of another iteration"
        )
    return found


def check_torch_dist(root: Path) -> None:
    """Raise SourceError, with what to do, unless `root` looks like a torch_dist checkpoint."""
    refuse_format(root, _backend(root))
    if (root / ".metadata").is_file():
        return
    if any(root.glob("mp_rank_*")):
        raise SourceError(f"{root}: a legacy mp_rank checkpoint, not torch_dist")
    if any(root.glob("*/.zarray")):
        refuse_format(root, "zarr")
    raise SourceError(
        f"{root}: no .metadata file: this is no torch_dist checkpoint, or its save was "
        "interrupted; give an iter_XXXXXXX directory that was saved completely"
    )


def refuse_format(root: Path, backend: object) -> None:
    """Raise SourceError if `backend` is a checkpoint format other than torch_dist."""
    if backend in (None, "torch_dist", "torch"):
        return
    reason = _REFUSED.get(str(backend), f"sharded backend {backend!r} is not known")
    raise SourceError(f"{root}: {reason}")


def _backend(root: Path) -> object:
    path = root / "metadata.json"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MAX_JSON_BYTES))
        return config["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptSourceError(f"{path}: no readable sharded_backend ({error!r})") from error
