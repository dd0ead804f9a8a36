"""What a window reads: ranges of stored tensors, packed close together in its slab.

Where the views of a tensor cover a range nearly whole (all ranks' slices of a matrix), the range is
read as it is. Where they leave much of it out (one rank's columns), only their own elements are
kept, so that memory does not depend on how a weight is sliced. Long runs are read by themselves;
short ones through a small buffer, since many reads of a few bytes cost more than one of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .plan import extent, intervals, storage_key
from .sources.stored import Stored

ALIGNMENT = 256
# Bytes that one read task brings, and the shortest run that is read by itself.
PART, LONG_RUN = 8 << 20, 64 << 10
# A range is read whole if no more than this share of what its views use comes on top.
SLACK = 1.25

Dims = tuple[tuple[int, int], ...]
ViewKey = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Load:
    """Elements of a stored tensor that go to bytes [at, at + nbytes) of a slab.

    `dims` are (size, stride) in elements, outermost first; elements come packed in that order.
    """

    stored: Stored
    first: int
    dims: Dims
    at: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(size for size, _ in self.dims)

    def tasks(self, slab: torch.Tensor) -> Iterator[Callable[[], int]]:
        """Reads of about `PART` bytes each; each returns its bytes."""
        size = self.stored.dtype.itemsize
        out = slab[self.at : self.at + self.numel * size].view(self.stored.dtype)
        group: list[tuple[int, Dims, torch.Tensor]] = []
        done = 0
        for first, dims in _parts(self.first, self.dims, size):
            count = math.prod(n for n, _ in dims)
            group.append((first, dims, out[done : done + count]))
            done += count
            if sum(part.nbytes for _, _, part in group) >= PART:
                yield _Task(self.stored, tuple(group))
                group = []
        if group:
            yield _Task(self.stored, tuple(group))


@dataclass(frozen=True)
class _Task:
    stored: Stored
    parts: tuple[tuple[int, Dims, torch.Tensor], ...]

    def __call__(self) -> int:
        for first, dims, out in self.parts:
            _read(self.stored, first, dims, out)
        return sum(out.nbytes for _, _, out in self.parts)


def _parts(first: int, dims: Dims, itemsize: int) -> Iterator[tuple[int, Dims]]:
    """Boxes that are each read at once, in packed order."""
    (size, stride), rest = dims[0], dims[1:]
    inner = _span(rest)
    if not rest and stride == 1:
        step = PART // itemsize
        yield from ((first + at, ((min(step, size - at), 1),)) for at in range(0, size, step))
        return
    run = dims[-1][0] if dims[-1][1] == 1 else 1
    if run * itemsize < LONG_RUN and inner * itemsize <= PART:
        step = max(1, (PART // itemsize - inner) // stride + 1)
        for at in range(0, size, step):
            yield first + at * stride, ((min(step, size - at), stride), *rest)
        return
    for at in range(size):
        yield from _parts(first + at * stride, rest, itemsize)


def _span(dims: Dims) -> int:
    return sum((size - 1) * stride for size, stride in dims) + 1


def _read(stored: Stored, first: int, dims: Dims, out: torch.Tensor) -> None:
    if len(dims) == 1 and dims[0][1] == 1:
        stored.read_flat(first, first + dims[0][0], out)
        return
    buffer = torch.empty(_span(dims), dtype=stored.dtype, device="cpu")
    stored.read_flat(first, first + buffer.numel(), buffer)
    size = stored.dtype.itemsize
    shape = tuple(n for n, _ in dims)
    # numpy has no bf16 and no fp8, and needs none to copy them.
    source, target = (one.view(torch.uint8).numpy().view(f"u{size}") for one in (buffer, out))
    strides = tuple(stride * size for _, stride in dims)
    box = np.lib.stride_tricks.as_strided(source, shape, strides, writeable=False)
    np.copyto(target.reshape(shape), box)


@dataclass(frozen=True)
class Placed:
    """A source view in a slab: where its memory begins, in bytes, and the view of it."""

    at: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def on(self, slab: torch.Tensor) -> torch.Tensor:
        """The view over a slab's bytes."""
        flat = slab[self.at : self.at + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class Loads:
    """All that a window reads, the views by key, and the slab's bytes that this takes."""

    loads: tuple[Load, ...]
    placed: Mapping[ViewKey, Placed]
    nbytes: int


def key_of(view: torch.Tensor) -> ViewKey:
    """The same for two views of the same elements in the same order."""
    return storage_key(view), int(view.storage_offset()), tuple(view.shape), view.stride()


def plan_loads(views: Iterable[torch.Tensor], stored: Mapping[int, Stored]) -> Loads:
    """Where the elements of meta views go; tensors in memory, and empty views, are left out."""
    by_storage: dict[int, dict[ViewKey, torch.Tensor]] = {}
    for view in views:
        if view.is_meta and view.numel():
            by_storage.setdefault(storage_key(view), {})[key_of(view)] = view
    planner = _Planner([], {}, 0)
    for key, group in by_storage.items():
        planner.add(stored[key], list(group.values()))
    return Loads(tuple(planner.loads), planner.placed, planner.end)


@dataclass
class _Planner:
    loads: list[Load]
    placed: dict[ViewKey, Placed]
    end: int

    def add(self, stored: Stored, views: list[torch.Tensor]) -> None:
        ranges = next(iter(intervals(views).values()))
        whole = sum(one.stop - one.start for one in ranges)
        dims = [_dims(view) for view in views]
        if whole <= SLACK * sum(math.prod(n for n, _ in one) for one in dims):
            for one in ranges:
                self._whole(stored, one.start, one.stop, views)
            return
        for view, own in zip(views, dims, strict=True):
            load = self._load(stored, int(view.storage_offset()), _merged(own))
            self._place(load, view, _packed(view, own), 0)

    def _whole(self, stored: Stored, start: int, stop: int, views: list[torch.Tensor]) -> None:
        load = self._load(stored, start, ((stop - start, 1),))
        for view in views:
            first, last = extent(view)
            if start <= first and last <= stop:
                self._place(load, view, view.stride(), first - start)

    def _load(self, stored: Stored, first: int, dims: Dims) -> Load:
        load = Load(stored, first, dims, self.end)
        self.loads.append(load)
        self.end += -(-load.numel * stored.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return load

    def _place(self, load: Load, view: torch.Tensor, strides: tuple[int, ...], offset: int) -> None:
        nbytes = load.numel * view.element_size()
        self.placed[key_of(view)] = Placed(
            load.at, nbytes, view.dtype, tuple(view.shape), strides, offset
        )


def _dims(view: torch.Tensor) -> Dims:
    """(size, stride) of a view's different elements, in the order of the memory; never empty."""
    pairs = zip(view.shape, view.stride(), strict=True)
    found = {(size, stride): None for size, stride in pairs if size != 1 and stride}
    return tuple(sorted(found, key=lambda pair: -pair[1])) or ((1, 1),)


def _merged(dims: Dims) -> Dims:
    """The same elements in the same order with as few dimensions as possible."""
    merged = [dims[0]]
    for size, stride in dims[1:]:
        outer, step = merged[-1]
        if step == size * stride:
            merged[-1] = (outer * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _packed(view: torch.Tensor, dims: Dims) -> tuple[int, ...]:
    """The view's strides once its elements lie packed in the order of `dims`."""
    strides = {pair: math.prod(n for n, _ in dims[i + 1 :]) for i, pair in enumerate(dims)}
    pairs = zip(view.shape, view.stride(), strict=True)
    return tuple(strides.get(pair, 0) if pair[0] != 1 else 0 for pair in pairs)
