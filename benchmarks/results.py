"""The figures of a run: lines on the screen, and `<card>.json` for the plots.

A file holds one section for each suite, with its date, command and versions; a run replaces the
sections of the suites that it ran and leaves the others.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .measure import card

LIBRARIES = (
    "torch", "triton", "fuseport", "megatron-core", "transformers", "torchao", "verl",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement.

    `share` is the part of the copy's rate, measured in the same run, at which `nbytes` moved.
    `spread` is the distance between the quartiles; times are in seconds. `ratio` says how many
    times as long as fuseport's own way on the same tensors this took; `copy` is the copy's rate in
    bytes per second, read and written ones counted. What is not known is None.
    """

    case: str
    scheme: str
    way: str
    nbytes: int
    seconds: float
    spread: float
    rounds: int
    share: float | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    ratio: float | None = None
    copy: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The row as it is shown."""
        parts = [
            f"{self.case:28} {self.scheme:6} {self.way:28}",
            f"{self.nbytes / 1e9:8.3f} GB {self.seconds * 1e3:10.3f} ms ±{self.spread * 1e3:8.3f}",
            "" if self.share is None else f"{self.share:6.3f} of copy",
            "" if self.launches is None else f"{self.launches:5} launches",
            "" if self.extra_bytes is None else f"+{self.extra_bytes / 2**20:8.1f} MiB",
            "" if self.ratio is None else f"{self.ratio:7.2f} × fuseport's time",
            *(f"{name} {value:.4g}" for name, value in self.details.items()),
        ]
        return "  ".join(filter(None, parts))


def versions() -> dict[str, str]:
    """Libraries that are installed, and the interpreter."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_name() -> str:
    """`<card>.json`: the card's name in letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", card()).strip("-").lower() + ".json"


def save(
    directory: Path, suites: Mapping[str, Sequence[Row]], command: str, failed: Sequence[str]
) -> Path:
    """Replace the suites' sections in the card's file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / file_name()
    known: dict[str, Any] = {"card": card(), "suites": {}}
    if path.exists():
        known = json.loads(path.read_text())
    date = datetime.now(timezone.utc).date().isoformat()
    for suite, rows in suites.items():
        known["suites"][suite] = {
            "date": date,
            "command": command,
            "versions": versions(),
            "failed": [name for name in failed if f"bench_{suite}" in name],
            "rows": [asdict(row) for row in rows],
        }
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path
