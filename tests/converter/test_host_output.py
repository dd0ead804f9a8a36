"""How a plan is laid out in one block of host memory and cut into windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseport.converter import host_output
from fuseport.converter.backend import copier
from fuseport.converter.host_output import (
    ALIGNMENT,
    Block,
    HostOutput,
    Span,
    places_of,
    spans,
    windows,
)
from fuseport.converter.layout import Layout, Stack, cat, flat_columns, flat_rows
from fuseport.converter.plan import Planned, build, on_meta
from fuseport.converter.targets.parts import TargetTensor
from fuseport.kernels.move import GivenScale, Move

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MiB = 1 << 20


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """What rules make: plain, transposed and repeated views, flattened, stacked or joined."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    numbers = torch.randn(rows, columns)
    kind = draw(st.sampled_from(["view", "transposed", "joined", "repeated", "heads", "stack"]))
    if kind == "transposed":
        return torch.randn(columns, rows).T
    if kind == "joined":
        return cat(numbers, torch.randn(draw(st.integers(1, 4)), columns), numbers[1:])
    if kind == "repeated":
        return cat(torch.ones(2, columns), torch.zeros(1, columns).expand(rows + 1, -1))
    if kind == "heads":
        heads = torch.randn(3, 2, rows + 1, columns)
        return draw(st.sampled_from([flat_rows(heads, 3), flat_columns(heads.transpose(0, 1))]))
    if kind == "stack":
        return Stack((cat(numbers, numbers[:1]), cat(numbers, numbers[:1])))
    return draw(st.sampled_from([numbers, numbers.flatten(), numbers[:, 0]]))


@st.composite
def plans(draw: st.DrawFn) -> list[Planned]:
    """Some tensors of any dtype, without memory yet."""
    targets = []
    for index, layout in enumerate(draw(st.lists(layouts(), min_size=1, max_size=6))):
        fp8 = draw(st.booleans())
        dtype = torch.float8_e4m3fn if fp8 else draw(st.sampled_from(DTYPES))
        quant = GivenScale(2.0) if fp8 else None
        targets.append(TargetTensor(0, str(index), layout, dtype, quant=quant))
    return build(targets, on_meta)


def row_of(span: Span) -> int:
    """Bytes of one row, all of it where the tensor has no rows."""
    dst = span.move.dst
    return dst.nbytes // (dst.shape[0] if dst.ndim else 1)


@given(plans())
def test_places_are_aligned_and_do_not_overlap(plan: list[Planned]) -> None:
    places, size = places_of(plan)
    ends = [place + one.nbytes for place, one in zip(places, plan, strict=True)]
    assert all(place % ALIGNMENT == 0 for place in places)
    assert all(end <= start for end, start in zip(ends, [*places[1:], size], strict=True))
    assert size <= sum(one.nbytes + ALIGNMENT for one in plan)


@given(plans(), st.integers(1, 300))
def test_every_byte_is_covered_exactly_once(plan: list[Planned], limit: int) -> None:
    places, size = places_of(plan)
    covered, expected = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for place, one in zip(places, plan, strict=True):
        expected[place : place + one.nbytes] = 1
    for span in spans(plan, places, limit):
        assert span.stop - span.start == span.move.dst.nbytes > 0
        covered[span.start : span.stop] += 1
    assert torch.equal(covered, expected)


@given(plans(), st.integers(1, 300))
def test_no_span_or_window_exceeds_the_limit_but_for_one_row(
    plan: list[Planned], limit: int
) -> None:
    every = list(spans(plan, places_of(plan)[0], limit))
    for span in every:
        assert span.stop - span.start <= max(limit, row_of(span))
    made = list(windows(every, limit))
    assert [span for window in made for span in window] == every
    for window in made:
        begin, end = window[0].start, window[-1].stop
        assert end - begin <= limit or len(window) == 1


def test_windows_are_as_full_as_they_can_be() -> None:
    move = Move(torch.empty(4, device="meta"), torch.empty(4))
    made = windows([Span(start, move) for start in (0, 256, 512, 768)], 512)
    assert [[span.start for span in window] for window in made] == [[0, 256], [512, 768]]


def test_a_large_tensor_is_cut_along_its_rows() -> None:
    source = torch.arange(70.0).view(10, 7)
    target = TargetTensor(0, "one", cat(source[:8], source[8:]), torch.float32)
    cut = list(spans(build([target], on_meta), [1024], 3 * 28))
    assert [(span.start - 1024) // 28 for span in cut] == [0, 3, 6, 8]
    assert [span.move.src.shape[0] for span in cut] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([span.move.src for span in cut]), source)


def test_a_cut_keeps_scale_and_shift() -> None:
    target = TargetTensor(
        0, "one", torch.ones(4, 2), torch.float8_e4m3fn, shift=1.0, quant=GivenScale(2.0)
    )
    cut = list(spans(build([target], on_meta), [0], 2))
    assert [(span.move.shift, span.move.quant) for span in cut] == [(1.0, GivenScale(2.0))] * 4


@given(plans())
def test_on_the_cpu_results_are_what_the_moves_say(plan: list[Planned]) -> None:
    output = HostOutput(plan, copier("torch", CPU), CPU, Block())
    for found, planned in zip(output.run(), plan, strict=True):
        expected = torch.empty(planned.dst.shape, dtype=planned.dst.dtype)
        for move in planned.moves:
            view = expected.as_strided(move.dst.shape, move.dst.stride(), move.dst.storage_offset())
            copier("torch", CPU)([Move(view, move.src, move.shift, move.quant)]).run()
        assert found.is_contiguous()
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def a_plan(*sources: torch.Tensor) -> list[Planned]:
    targets = [
        TargetTensor(0, str(index), source, torch.float32) for index, source in enumerate(sources)
    ]
    return build(targets, on_meta)


def test_a_second_run_takes_the_new_values_into_the_same_memory() -> None:
    source = torch.ones(5, 3)
    output = HostOutput(a_plan(source), copier("torch", CPU), CPU, Block())
    (first,) = output.run()
    source.fill_(2.0)
    (second,) = output.run()
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, source)


def test_a_block_is_used_again_where_it_is_large_enough() -> None:
    block = Block()
    large = block.reserve(4 * MiB).data_ptr()
    assert block.reserve(MiB).data_ptr() == large
    assert block.reserve(4 * MiB).data_ptr() == large
    grown = block.reserve(5 * MiB)
    assert grown.numel() >= 5 * MiB
    grown[-1] = 1
    assert not block.registered


def test_results_outlive_their_block() -> None:
    """A converter may be thrown away while its weights are in use."""
    block = Block()
    source = torch.randn(300, 300)
    (found,) = HostOutput(a_plan(source), copier("torch", CPU), CPU, block).run()
    block.reserve(8 * MiB)
    del block
    assert torch.equal(found, source)


def test_an_empty_plan_and_empty_tensors() -> None:
    make = copier("torch", CPU)
    assert HostOutput([], make, CPU, Block()).run() == []
    plan = a_plan(torch.empty(0, 3), torch.ones(2))
    assert places_of(plan) == ([0, 0], ALIGNMENT)
    empty, ones = HostOutput(plan, make, CPU, Block()).run()
    assert (empty.shape, ones.tolist()) == ((0, 3), [1.0, 1.0])


@pytest.mark.parametrize("refused", [False, True])
def test_populated_memory_gives_the_same_results(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def madvise(address: int, size: int, advice: int) -> int:
        asked.append((address, size, advice))
        return -1 if refused else real(address, size, advice)

    real = host_output._madvise
    monkeypatch.setattr(host_output, "_madvise", madvise)
    monkeypatch.setattr(host_output, "POPULATED", MiB)
    block, source = Block(), torch.randn(1000, 1000)
    (found,) = HostOutput(a_plan(source), copier("torch", CPU), CPU, block).run()
    first, size = block.memory.data_ptr(), block.memory.numel()
    assert block._populating is not None
    block._populating.shutdown(wait=True)
    assert torch.equal(found, source)
    assert {advice for _, _, advice in asked} == {23}
    # Threads of a block that an earlier test threw away may still ask for its last pages.
    ours = [(start - first, part) for start, part, _ in asked if 0 <= start - first < size]
    assert sorted(ours) == [(start, min(MiB, size - start)) for start in range(0, size, MiB)]
