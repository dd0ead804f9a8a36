"""Coalescing: the fewest strided dimensions that describe a pair of views, and their boxes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseport.kernels.move import (
    FOLD,
    TILE_COLS,
    Box,
    Dim,
    GivenScale,
    Move,
    coalesce,
    describe,
    is_vector,
)
from fuseport.kernels.quant import MxScale, RowScale, TensorScale
from fuseport.kernels.reference import fused_copy_ref


def covered(boxes: list[Box]) -> list[tuple[int, int]]:
    """(dst, src) element offsets of every element of the boxes."""
    found = []
    for box in boxes:
        dims = (box.outer, box.rows, box.cols)
        for index in itertools.product(*(range(dim.size) for dim in dims)):
            dst = box.dst_offset + sum(i * d.dst for i, d in zip(index, dims, strict=True))
            src = box.src_offset + sum(i * d.src for i, d in zip(index, dims, strict=True))
            found.append((dst, src))
    return sorted(found)


def elements(dst: torch.Tensor, src: torch.Tensor) -> list[tuple[int, int]]:
    """The same, by indexing."""
    return sorted(
        (
            sum(i * s for i, s in zip(index, dst.stride(), strict=True)),
            sum(i * s for i, s in zip(index, src.stride(), strict=True)),
        )
        for index in itertools.product(*map(range, dst.shape))
    )


def test_contiguous_pair_is_one_dimension() -> None:
    assert coalesce(torch.empty(4, 5, 6), torch.empty(4, 5, 6)) == [Dim(120, 1, 1)]


def test_column_slice_is_two_dimensions() -> None:
    whole = torch.empty(8, 100)
    assert coalesce(torch.empty(8, 10), whole[:, 30:40]) == [Dim(8, 10, 100), Dim(10, 1, 1)]


def test_query_heads_of_an_interleaved_qkv_are_two_dimensions() -> None:
    groups, queries, head, hidden = 4, 2, 8, 16
    qkv = torch.empty(groups * (queries + 2) * head, hidden).unflatten(0, (groups, -1, head))
    dst = torch.empty(groups, queries, head, hidden)
    run = queries * head * hidden
    assert coalesce(dst, qkv[:, :queries]) == [Dim(4, run, 2 * run), Dim(run, 1, 1)]


def test_repeated_rows_keep_stride_zero() -> None:
    assert coalesce(torch.empty(3, 8), torch.empty(1, 8).expand(3, 8))[0] == Dim(3, 8, 0)


def test_scalar_and_empty() -> None:
    assert coalesce(torch.empty(()), torch.empty(())) == [Dim(1, 1, 1)]
    assert list(describe(torch.empty(0, 3), torch.empty(0, 3))) == []


def test_order_follows_the_strides() -> None:
    def order(src: torch.Tensor) -> set[str]:
        return {box.order for box in describe(torch.empty(src.shape), src)}

    assert order(torch.empty(8, 9)) == {"straight"}
    assert order(torch.empty(9, 8).T) == {"transposed"}
    assert order(torch.empty(8, 18)[:, ::2]) == {"strided"}


def test_long_runs_fold_into_full_rows_and_a_rest() -> None:
    size = FOLD + TILE_COLS + 7
    boxes = list(describe(torch.empty(size), torch.empty(size)))
    assert [(box.rows.size, box.cols.size) for box in boxes] == [(65, TILE_COLS), (1, 7)]
    assert boxes[1].dst_offset == boxes[1].src_offset == size - 7


def test_more_than_two_billion_elements() -> None:
    size = 2**32 + 3
    dst = torch.empty(size, dtype=torch.uint8, device="meta")
    boxes = list(describe(dst, dst))
    assert sum(box.outer.size * box.rows.size * box.cols.size for box in boxes) == size
    assert boxes[0].rows.size % 8 == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_boxes_cover_each_element_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    axes = data.draw(st.permutations(range(len(sizes))))
    steps = [data.draw(st.sampled_from([1, 1, 2, 0])) for _ in sizes]
    storage = torch.empty([size * max(step, 1) for size, step in zip(sizes, steps, strict=True)])
    strides = [s * step for s, step in zip(storage.stride(), steps, strict=True)]
    src = storage.as_strided(sizes, strides).permute(axes)
    dst = torch.empty(src.shape)
    assert covered(list(describe(dst, src))) == elements(dst, src)


STRAIGHT = Box(Dim(2, 8192, 16384), Dim(7, 512, 1024), Dim(512, 1, 1), 0, 0, "straight")
TRANSPOSED = Box(Dim(2, 8192, 16384), Dim(64, 128, 1), Dim(128, 1, 64), 0, 0, "transposed")
# What the kernels tell the compiler is a multiple of 16: a wrong word there is wrong bits on a GPU,
# and nothing in Triton's interpreter.
HINTED = [
    *((STRAIGHT, name) for name in ("cols.size", "outer.dst", "outer.src", "rows.dst", "rows.src")),
    *((TRANSPOSED, name) for name in ("cols.size", "outer.dst", "outer.src", "rows.dst")),
    *((TRANSPOSED, name) for name in ("rows.size", "cols.src")),
]


@pytest.mark.parametrize(("box", "name"), HINTED, ids=lambda one: getattr(one, "order", one))
def test_vector_needs_everything_to_be_a_multiple_of_16(box: Box, name: str) -> None:
    assert is_vector(box, 16, 32)
    dim, field = name.split(".")
    odd = {field: getattr(getattr(box, dim), field) + 8}
    assert not is_vector(replace(box, **{dim: replace(getattr(box, dim), **odd)}), 16, 32)


def test_vector_needs_aligned_addresses_and_a_unit_stride() -> None:
    assert not is_vector(STRAIGHT, 8, 0)
    assert not is_vector(STRAIGHT, 0, 8)
    assert not is_vector(replace(STRAIGHT, order="strided"), 0, 0)


def test_moves_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Move(torch.empty(2), torch.empty(3))
    with pytest.raises(ValueError, match="no conversion"):
        Move(torch.empty(2), torch.empty(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="GivenScale makes"):
        Move(torch.empty(2), torch.empty(2), quant=GivenScale(1.0))
    with pytest.raises(TypeError, match="found Tensor, NoneType, NoneType"):
        Move(torch.empty(2), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a scheme such as GivenScale or None, found .* float"):
        Move(torch.empty(2), torch.empty(2), quant=0.5)  # type: ignore[arg-type]


def test_scales_that_do_not_fit_are_refused() -> None:
    """A kernel is given addresses alone: it would write beyond them, or another dtype's bits."""
    codes, source = torch.empty(4, 64, dtype=torch.float8_e4m3fn), torch.empty(4, 64)
    for scale, first in ((torch.empty(3), 0), (torch.empty(4), 1), (torch.empty(4), -1)):
        with pytest.raises(ValueError, match=r"RowScale has scales for . rows"):
            Move(codes, source, quant=RowScale(scale, 64, first))
    for scales in (torch.empty(4, dtype=torch.bfloat16), torch.empty(8)[::2]):
        with pytest.raises(ValueError, match=r"RowScale needs a contiguous .*float32"):
            RowScale(scales, 64)
    with pytest.raises(ValueError, match="needs 2 scales across 64 elements"):
        MxScale(torch.empty(4, 3, dtype=torch.uint8), 64)
    with pytest.raises(ValueError, match=r"found 64\.0"):
        RowScale(torch.empty(4), 64.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dequant_scale must be an fp32 tensor of one element"):
        TensorScale(torch.empty(1, dtype=torch.bfloat16), torch.empty(1))
    with pytest.raises(ValueError, match="amax must be an fp32 tensor of one element"):
        TensorScale(torch.empty(1), torch.empty(2))


def test_moves_may_come_from_a_generator() -> None:
    source, dst = torch.ones(3), torch.zeros(2, 3)
    fused_copy_ref(Move(row, source) for row in dst)  # type: ignore[arg-type]
    assert dst.eq(1).all()
