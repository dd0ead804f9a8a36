"""When each stage of a conversion was busy, in a fixed number of equal spans of time.

The spans double whenever a run outlasts them, so that a long run needs no more memory. Rejected: a
record of every piece of work, of which there are millions in a large conversion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SPANS = 240


@dataclass
class Timeline:
    """`busy` has a stage's busy seconds in each span of `width` seconds, summed over threads."""

    width: float = 0.01
    busy: dict[str, list[float]] = field(default_factory=dict)

    def add(self, stage: str, begin: float, end: float) -> None:
        """Count work from second `begin` to second `end` of the run."""
        while end >= self.width * SPANS:
            self._double()
        spans = self.busy.setdefault(stage, [0.0] * SPANS)
        for index in range(int(begin / self.width), int(end / self.width) + 1):
            low, high = index * self.width, (index + 1) * self.width
            spans[index] += max(0.0, min(end, high) - max(begin, low))

    def _double(self) -> None:
        self.width *= 2
        for stage, spans in self.busy.items():
            pairs = [one + two for one, two in zip(spans[::2], spans[1::2], strict=True)]
            self.busy[stage] = pairs + [0.0] * (SPANS - len(pairs))
