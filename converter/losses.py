"""What a conversion loses: saturated and non-finite elements, and the error of quantisation.

With signal Σx² and noise Σ(x − dequantised)² over the finite elements of a weight, its relative
error is √(noise / signal), and the signal-to-noise ratio of a model is 10 · log10 of the ratio of
both sums over all quantised weights, in dB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def place(file: str, tensor: str) -> str:
    """What a tensor of a file is called where losses are listed."""
    return f"{Path(file).stem}/{tensor}"


@dataclass(frozen=True)
class Losses:
    """By target tensor, where there are any; `power` has (signal, noise) of measured weights."""

    saturated: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    power: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, counts: Sequence[int], power: Sequence[float]) -> None:
        """A tensor's (saturated, non-finite) counts and (signal, noise) sums."""
        for found, count in zip((self.saturated, self.nonfinite), counts, strict=True):
            if count:
                found[name] = count
        signal, noise = power
        if signal:
            self.power[name] = signal, noise

    def summary(self) -> dict[str, Any]:
        """As a report and a manifest have it."""
        return {
            "saturated": self.saturated,
            "nonfinite": self.nonfinite,
            "relative_errors": self.relative_errors(),
            "snr_db": self.snr_db(),
        }

    def relative_errors(self) -> dict[str, float]:
        """The relative error of each measured weight."""
        return {name: math.sqrt(noise / signal) for name, (signal, noise) in self.power.items()}

    def snr_db(self) -> float | None:
        """Over the whole model; None if nothing was measured, or nothing was lost."""
        signal, noise = (math.fsum(one[index] for one in self.power.values()) for index in (0, 1))
        return 10.0 * math.log10(signal / noise) if noise else None
