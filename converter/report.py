"""What a conversion did, for whoever asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """What a conversion did, and what it lost, by target tensor (see `losses`).

    `codes` says how many quantised weights of the source were "kept", how many "dequantised".
    """

    out: Path
    nbytes: int
    tensors: int
    saturated: Mapping[str, int]
    nonfinite: Mapping[str, int]
    relative_errors: Mapping[str, float]
    snr_db: float | None
    codes: Mapping[str, int]
