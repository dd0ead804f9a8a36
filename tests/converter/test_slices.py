"""Parts of views in pieces of a tensor, against indexing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseport.converter.shards import Local, Piece, Whole
from fuseport.converter.slices import slices

View = Callable[[torch.Tensor], torch.Tensor]
SHAPE = (24, 20)
# Views as rules make them: heads of interleaved groups, exchanged axes, repeats, every other row.
VIEWS: dict[str, View] = {
    "whole": lambda t: t,
    "queries": lambda t: t.unflatten(0, (2, -1, 3))[:, :2],
    "keys": lambda t: t.unflatten(0, (2, -1, 3))[:, 2],
    "columns by head": lambda t: t.unflatten(1, (2, 5, 2)).movedim(0, 2)[1],
    "transposed": lambda t: t.T[3:17],
    "repeated row": lambda t: t[5:6].expand(7, -1),
    "every other": lambda t: t[1::2, ::5],
    "a corner": lambda t: t[23:, 19:],
    "nothing": lambda t: t[4:4],
}


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    inner = draw(st.sets(st.integers(1, length - 1), max_size=5))
    return [0, *sorted(inner), length]


@pytest.mark.parametrize("name", VIEWS)
@given(data=st.data())
def test_slices_cover_a_view_once(name: str, data: st.DataObject) -> None:
    rows, columns = data.draw(cuts(SHAPE[0])), data.draw(cuts(SHAPE[1]))
    numbers = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE)
    held = {
        (top, left): numbers[top:bottom, left:right].clone(memory_format=torch.contiguous_format)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    }
    pieces = tuple(
        Piece(start, tuple(box.shape), {3: Local(tuple(box.stride()), 0)})
        for start, box in held.items()
    )
    expected = VIEWS[name](numbers)
    found = torch.full(expected.shape, -1)
    whole = Whole(SHAPE, SHAPE, numbers.dtype, pieces)
    for one in slices(found, VIEWS[name](torch.empty(SHAPE, device="meta")), whole):
        assert bool((one.dst == -1).all())
        one.dst.copy_(one.view(3).of(held[one.piece.start[0], one.piece.start[1]]))
    assert torch.equal(found, expected)


def test_a_cut_between_whole_heads_is_one_slice() -> None:
    pieces = tuple(Piece((row, 0), (12, 20), {0: Local((20, 1), 0)}) for row in (0, 12))
    whole = Whole(SHAPE, SHAPE, torch.float32, pieces)
    view = VIEWS["queries"](torch.empty(SHAPE, device="meta"))
    assert len(list(slices(view, view, whole))) == 2
