"""Schemes whose scales are computed: kernel against reference bit for bit, at odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fuseport_testing.matrices import DEVICE, E4M3, NAMES, Matrix, poisoned, values

from fuseport.kernels.fused_copy import FusedCopy, fused_copy
from fuseport.kernels.move import Move
from fuseport.kernels.quant import MxScale, RowScale
from fuseport.kernels.reference import fused_copy_ref

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def check(name: str, sources: Sequence[torch.Tensor], **options: Any) -> Matrix:
    """Kernel and reference on poisoned outputs: codes, scales and counters are the same."""
    columns = options.pop("columns", sources[0].shape[-1])
    rows = sum(source.numel() for source in sources) // columns
    found, expected = (Matrix(name, rows, columns) for _ in range(2))
    counts = FusedCopy(found.moves(sources), **options).run(count=True)
    wanted = fused_copy_ref(expected.moves(sources), count=True)
    for one, other in zip(found.bits(), expected.bits(), strict=True):
        wrong = (one != other).nonzero()
        assert not len(wrong), f"{name}: first at {wrong[0].tolist()}, {len(wrong)} differ"
    assert counts is not None
    assert wanted is not None
    assert torch.equal(counts.sum(0), wanted.sum(0))
    return found


def turned(source: torch.Tensor) -> torch.Tensor:
    """The same matrix, stored by columns."""
    return source.T.contiguous().T


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (128, 128), (130, 544), (35, 1056)])
def test_odd_sizes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(name, [values(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 96), (272, 192), (130, 544)])
def test_transposed_odd_sizes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(name, [turned(values(*shape, dtype=dtype))])


@pytest.mark.parametrize("name", ["tensor", "row", "block"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (129, 1), (5, 1129), (2, 4001)])
def test_columns_that_no_vector_divides(name: str, shape: tuple[int, int]) -> None:
    check(name, [values(*shape)])
    check(name, [turned(values(*shape))])


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_source_is_read_where_it_is(name: str) -> None:
    """Experts as one matrix holds them, `[in, experts · out]`: nothing is gathered first."""
    stored = values(96, 3 * 128)
    experts = stored.unflatten(1, (3, 128)).permute(1, 2, 0)
    (launch,) = FusedCopy(Matrix(name, 384, 96).moves([experts])).launches
    assert (launch.kind.order, launch.kind.vector) == ("transposed", True)
    check(name, [experts])
    check(name, [stored[:, 5:133].T])


def test_what_is_contiguous_along_neither_is_gathered() -> None:
    (launch,) = FusedCopy(Matrix("block", 64, 96).moves([values(96, 128)[:, ::2].T])).launches
    assert launch.kind.order == "straight"
    check("block", [values(96, 128)[:, ::2].T])


@pytest.mark.parametrize("columns", [48, 1040])
def test_an_odd_number_of_pieces(columns: int) -> None:
    """A row of codes is then no multiple of 16 bytes, although its source is one of 16 elements."""
    check("nv", [values(9, columns)])
    for width, vector in ((columns, False), (columns + 16, True)):
        moves = Matrix("nv", 9, width).moves([values(9, width)])
        assert [launch.kind.vector for launch in FusedCopy(moves).launches] == [vector]


@pytest.mark.parametrize("columns", [8192, 16384, 16400, 20000])
def test_long_rows(columns: int) -> None:
    check("row", [values(3, columns)])


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_matrix(name: str) -> None:
    """q, k and v as a rank has them: heads of 64 rows, so that blocks straddle the parts."""
    qkv = values(2 * 5 * 64, 256).unflatten(0, (2, 5, 64))
    check(name, [qkv[:, :3], qkv[:, 3], qkv[:, 4]], columns=256)


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_heads(name: str) -> None:
    out = values(192, 2 * 4 * 64).unflatten(1, (2, 4, 64))
    check(name, [out[:, :, 1:3]], columns=256)


@pytest.mark.parametrize("name", NAMES)
def test_slices_transposes_and_repeats(name: str) -> None:
    check(name, [values(128, 768)[:, 256:512]])
    check(name, [values(128, 256).T])
    check(name, [values(1, 128, 128).expand(3, 128, 128)])
    check(name, [values(132, 131)[1:129, 3:131]])


@pytest.mark.parametrize("name", NAMES)
def test_experts_each_have_their_own(name: str) -> None:
    experts = values(3, 128, 256)
    found, expected = ([Matrix(name, 128, 256) for _ in range(3)] for _ in range(2))
    FusedCopy([m for one, x in zip(found, experts, strict=True) for m in one.moves([x])]).run()
    fused_copy_ref([m for one, x in zip(expected, experts, strict=True) for m in one.moves([x])])
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


@pytest.mark.parametrize("name", ["tensor", "nv"])
def test_matrices_of_a_group_share_a_scale(name: str) -> None:
    for run in (lambda moves: FusedCopy(moves).run(), fused_copy_ref):
        group = poisoned(1, dtype=torch.float32)
        small, large = (Matrix(name, 32, 64, group) for _ in range(2))
        run(
            [*small.moves([values(32, 64, spread=0)]), *large.moves([8 * values(32, 64, spread=0)])]
        )
        assert torch.equal(small.bits()[-1], large.bits()[-1])
        assert float(group) == float(values(32, 64, spread=0).abs().max()) * 8


@pytest.mark.parametrize("name", ["tensor", "nv"])
def test_amaxes_can_be_merged_over_ranks(name: str) -> None:
    source = values(32, 64, spread=0)
    for run in (lambda moves, **k: FusedCopy(moves).run(**k), fused_copy_ref):
        matrix = Matrix(name, 32, 64)
        run(matrix.moves([source]), reduce=lambda amaxes: [amax.mul_(4) for amax in amaxes])
        largest = 448.0 if name == "tensor" else 2688.0
        scale = matrix.scales if name == "tensor" else matrix.second
        assert float(scale) == float(source.float().abs().max().cpu() * 4 / torch.tensor(largest))


# The hardware's route to e4m3 and the integers'; without a GPU there are the integers alone.
ROUTES = [False] if DEVICE == "cpu" else [True, False]


@pytest.mark.parametrize("native", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_every_code_of_bf16_and_fp16(name: str, native: bool) -> None:
    """All 65,536 values of both formats, in rows of neighbours and shuffled, many amaxes."""
    # Where an amax is that of a row or a block, rows are short; pieces are the same in long ones.
    columns = 128 if name in ("row", "block") else 512
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(1))]
        for order in (every, shuffled):
            source = order.view(-1, columns).to(DEVICE)
            check(name, [source], native_e4m3=native)
            check(name, [turned(source)], native_e4m3=native)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-45, 3e38])
def test_special_values(name: str, special: float) -> None:
    source = values(64, 256, dtype=torch.float32)
    check(name, [torch.full_like(source, special)])
    source[::3, ::5] = special
    source[:32, :128] = special
    check(name, [turned(source)])
    found = check(name, [source])
    scales = found.scales.float() if name != "mx" else torch.exp2(found.scales.double() - 127)
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())


@pytest.mark.parametrize("exponent", [-149, -126, -118, -62, -59, 98, 102, 118])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_and_huge_matrices(name: str, exponent: int) -> None:
    """Where a scale, its reciprocal or a remainder leaves the range of fp32."""
    normal = values(64, 256, dtype=torch.float32, spread=1).double()
    check(name, [(normal * 2.0**exponent).clamp(-3e38, 3e38).float()])


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_forgets_the_first(name: str) -> None:
    source = values(96, 256, dtype=torch.float32)
    source[3, 4] = float("nan")
    found, expected = Matrix(name, 96, 256), Matrix(name, 96, 256)
    batch = FusedCopy(found.moves([source]))
    batch.run(count=True)
    source.copy_(values(96, 256, dtype=torch.float32) / 64)
    counts = batch.run(count=True)
    wanted = fused_copy_ref(expected.moves([source]), count=True)
    assert all(map(torch.equal, found.bits(), expected.bits()))
    assert counts is not None
    assert wanted is not None
    assert torch.equal(counts, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_power(name: str) -> None:
    """Signal and noise are those of what the codes stand for."""
    source = values(96, 256, dtype=torch.float32, spread=0)
    source[3, 4] = float("nan")
    runs = ((fused_copy, source), (fused_copy, turned(source)), (fused_copy_ref, source))
    for run, matrix in runs:
        power = torch.zeros(1, 2, dtype=torch.float64, device=DEVICE)
        run(Matrix(name, 96, 256).moves([matrix]), power=power)
        signal, noise = power[0].tolist()
        assert signal == pytest.approx(float(source.nan_to_num().double().square().sum()), rel=1e-5)
        decibels = 10 * torch.log10(torch.tensor(signal / noise))
        low, high = (18, 24) if name == "nv" else (28, 36)
        assert low < decibels < high


def test_a_matrix_with_gaps_is_refused() -> None:
    matrix = Matrix("block", 192, 128)
    first, _, third = matrix.moves([values(64, 128) for _ in range(3)])
    with pytest.raises(ValueError, match="without gaps"):
        FusedCopy([first, third])


def test_rows_that_pieces_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        MxScale(poisoned(4, 1), 40)


def test_a_part_of_a_row_is_refused() -> None:
    quant = RowScale(torch.empty(4, device=DEVICE), 64)
    with pytest.raises(ValueError, match="whole rows"):
        Move(poisoned(4, 40).view(E4M3), values(4, 40), 0.0, quant)
