"""Moves that are repeated over other memory: each time as if it were planned by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fuseport_testing.matrices import DEVICE, E4M3, NAMES, Matrix, values

from fuseport.kernels.fused_copy import FusedCopy
from fuseport.kernels.move import GivenScale, Move
from fuseport.kernels.quant import NvScale
from fuseport.kernels.reference import fused_copy_ref
from fuseport.kernels.repeats import Repeat, Time

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
TIMES = 3


def memory(matrix: Matrix) -> list[torch.Tensor]:
    second = [matrix.second] if matrix.name == "nv" else []
    return [matrix.codes, matrix.scales, *second, matrix.amax]


def sources(seed: int, *rows: int, columns: int = 256) -> list[torch.Tensor]:
    return [values(count, columns, spread=1) * 2.0**seed for count in rows]


def repeated(name: str, each: Sequence[Sequence[torch.Tensor]], group: bool = False) -> None:
    """All times in one batch, beside an own move; the pattern's own memory stays as it was."""
    rows, columns = sum(len(one) for one in each[0]), each[0][0].shape[-1]
    shared = [torch.full((1,), 3e38, device=DEVICE) for _ in range(3)] if group else [None] * 3
    pattern = Matrix(name, rows, columns)
    found, alone, expected = (
        [Matrix(name, rows, columns, amax) for _ in range(1 + len(each))] for amax in shared
    )
    moves = pattern.moves(each[0])
    times = [Time(memory(one), own) for one, own in zip(found[1:], each, strict=True)]
    repeat = Repeat(moves, memory(pattern), each[0], range(len(moves)), times)
    own = sources(0, rows, columns=columns)
    FusedCopy(found[0].moves(own), [repeat]).run()
    fused_copy_ref([m for one, x in zip(expected, [own, *each], strict=True) for m in one.moves(x)])
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one.bits(), other.bits()))
    assert all(map(torch.equal, pattern.bits(), Matrix(name, rows, columns).bits()))

    times = [Time(memory(one), own) for one, own in zip(alone[1:], each, strict=True)]
    repeat = Repeat(moves, memory(pattern), each[0], range(len(moves)), times)
    written = list(repeat.written_out())
    assert len(written) == len(moves) * len(each)
    fused_copy_ref([*alone[0].moves(own), *written])
    for one, other in zip(alone, expected, strict=True):
        assert all(map(torch.equal, one.bits(), other.bits()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [False, True], ids=["alone", "grouped"])
def test_two_moves_of_a_matrix(name: str, group: bool) -> None:
    repeated(name, [sources(seed, 128, 40) for seed in range(TIMES)], group)


def test_what_must_be_gathered_is_gathered_each_time() -> None:
    """Blocks that straddle two moves."""
    repeated("block", [sources(seed, 40, 128) for seed in range(TIMES)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, E4M3], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_plain_given_and_transposed(dtype: torch.dtype, offset: int) -> None:
    """Sources anywhere in one buffer, at one alignment; a scale for each time."""
    buffer = values(TIMES + 1, 8192 + 16 * 40 + 8)
    scales = [2.0**-n for n in range(TIMES + 1)]
    shift = 0.0 if dtype is E4M3 else 1.0

    def views(number: int) -> list[torch.Tensor]:
        flat = buffer[number, offset:]
        return [flat[:4096].view(64, 64).T, flat[4096 : 4096 + 16 * 40].view(16, 40)]

    def out() -> list[torch.Tensor]:
        shapes = ((64, 64), (16, 40))
        return [torch.empty(shape, dtype=dtype, device=DEVICE) for shape in shapes]

    def moves(number: int, outputs: Sequence[torch.Tensor]) -> list[Move]:
        quant = GivenScale(scales[number]) if dtype is E4M3 else None
        pairs = zip(outputs, views(number), strict=True)
        return [Move(dst, src, shift, quant) for dst, src in pairs]

    own, found, expected = out(), [out() for _ in range(TIMES)], [out() for _ in range(TIMES)]
    times = [Time(one, [buffer[n, offset:]], scales[n]) for n, one in enumerate(found, 1)]
    FusedCopy([], [Repeat(moves(0, own), own, [buffer[0, offset:]], [0, 0], times)]).run()
    fused_copy_ref([move for n, one in enumerate(expected, 1) for move in moves(n, one)])
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_scales_of_single_experts() -> None:
    """A move's scales may be a part of an output."""
    each = [sources(seed, 32, 32) for seed in range(TIMES + 1)]

    def of(number: int, codes: torch.Tensor, scales: torch.Tensor) -> list[Move]:
        second, amax = (torch.empty(1, device=DEVICE) for _ in range(2))
        return [
            Move(codes[e], x, 0.0, NvScale(scales[e], 256, second_scale=second, amax=amax))
            for e, x in enumerate(each[number])
        ]

    def out() -> list[torch.Tensor]:
        codes = torch.zeros(2, 32, 128, dtype=torch.uint8, device=DEVICE)
        return [codes, torch.zeros(2, 32, 16, dtype=E4M3, device=DEVICE)]

    def scratch() -> list[torch.Tensor]:
        return [torch.empty(1, device=DEVICE) for _ in range(2)]

    own = out()
    moves = of(0, *own)
    assert all(isinstance(move.quant, NvScale) for move in moves)
    quants = [move.quant for move in moves if isinstance(move.quant, NvScale)]
    outputs = [*own, *(q.second_scale for q in quants[:1]), *(q.amax for q in quants[:1])]
    found, expected = [out() for _ in range(TIMES)], [out() for _ in range(TIMES)]
    times = [Time([*one, *scratch()], each[n]) for n, one in enumerate(found, 1)]
    FusedCopy([], [Repeat(moves, outputs, each[0], [0, 1], times)]).run()
    for number, one in enumerate(expected, 1):
        fused_copy_ref(of(number, *one))
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_batch_with_repeats_has_no_counters() -> None:
    src, dst = torch.ones(4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    repeat = Repeat([Move(dst[0], src)], [dst[0]], [src], [0], [Time([dst[1]], [src])])
    batch = FusedCopy([], [repeat])
    with pytest.raises(ValueError, match="neither count"):
        batch.run(count=True)
    batch.run()
    assert dst.sum(1).tolist() == [0.0, 4.0]
