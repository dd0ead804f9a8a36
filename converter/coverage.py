"""Accounting: how often each source element is used by a plan.

Each move's source view is a set of contiguous runs; boundaries of all runs, sorted, give the
number of elements that are used 0, 1, 2 … times, exactly, without looking at any weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from .plan import Planned, storage_key

# A storage's uses: how many of its elements are used so many times.
Uses = dict[int, int]


def runs(view: torch.Tensor) -> tuple[np.ndarray, int]:
    """First elements of a view's contiguous runs, and the length of each.

    Repeats (stride 0) appear as many times as they are repeated.
    """
    dims = sorted(zip(view.stride(), view.shape, strict=True))
    length = 1
    rest: list[tuple[int, int]] = []
    for stride, size in dims:
        if size == 1:
            continue
        if stride == length and not rest:
            length *= size
        else:
            rest.append((stride, size))
    starts = np.array([view.storage_offset()], dtype=np.int64)
    for stride, size in rest:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return starts, length


def uses(plan: Iterable[Planned], sizes: dict[int, int]) -> dict[int, Uses]:
    """For each storage in `sizes` (key → elements), how many elements are used how many times.

    One storage after the other, so that memory depends on the largest one alone.
    """
    views: dict[int, list[torch.Tensor]] = {key: [] for key in sizes}
    for planned in plan:
        for move in planned.moves:
            key = storage_key(move.src)
            if key in sizes and move.src.numel():
                views[key].append(move.src)
    return {key: _histogram(*_ends(views[key]), size) for key, size in sizes.items()}


def _ends(views: Iterable[torch.Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Where the views' runs begin and end."""
    found = [runs(view) for view in views]
    return [starts for starts, _ in found], [starts + length for starts, length in found]


def _histogram(starts: list[np.ndarray], ends: list[np.ndarray], size: int) -> Uses:
    if not starts:
        return {0: size}
    begin, end = np.concatenate(starts), np.concatenate(ends)
    places = np.concatenate([[0], begin, end, [size]])
    steps = np.concatenate([[0], np.ones_like(begin), -np.ones_like(end), [0]])
    order = np.argsort(places, kind="stable")
    depth = np.cumsum(steps[order])[:-1]
    lengths = np.diff(places[order])
    counts: Counter[int] = Counter()
    for times in np.unique(depth[lengths > 0]):
        counts[int(times)] = int(lengths[depth == times].sum())
    return dict(counts)
