"""Kernel against reference, bit for bit: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from fuseport_testing.matrices import DEVICE, E4M3, poisoned

from fuseport.kernels.fused_copy import FusedCopy, fused_copy
from fuseport.kernels.move import GivenScale, Move
from fuseport.kernels.quant import BlockScale, TensorScale
from fuseport.kernels.reference import fused_copy_ref

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check(
    src: torch.Tensor,
    dtype: torch.dtype,
    shift: float = 0.0,
    quant: GivenScale | None = None,
    native: bool | None = None,
    counting: tuple[bool, ...] = (False, True),
) -> None:
    """Poison both destinations, run kernel and reference, and compare values and counters."""
    for count in counting:
        dst, expected = (poisoned(*src.shape, dtype=dtype) for _ in range(2))
        move, twin = Move(dst, src, shift, quant), Move(expected, src, shift, quant)
        found = FusedCopy([move], native_e4m3=native).run(count=count)
        counts = fused_copy_ref([twin], count=count)
        wrong = (bits(dst) != bits(expected)).nonzero()
        assert not len(wrong), f"first difference at byte {int(wrong[0])}"
        if count:
            assert found is not None
            assert counts is not None
            assert found.tolist() == counts.tolist()


def randn(*shape: int) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda dtype: (torch.randn(shape, device=DEVICE) * 100).to(dtype)


View = Callable[[torch.Tensor], torch.Tensor]

# What is allocated, and the view of it that is moved.
SHAPES: dict[str, tuple[Callable[[torch.dtype], torch.Tensor], View]] = {
    "one": (randn(1), lambda t: t),
    "scalar": (randn(), lambda t: t),
    "odd run": (randn(4001), lambda t: t),
    "full tiles": (randn(64, 512), lambda t: t),
    "odd rows and columns": (randn(33, 257), lambda t: t),
    "one column": (randn(63, 1), lambda t: t),
    "column slice": (randn(40, 128), lambda t: t[:, 32:96]),
    "unaligned slice": (randn(40, 128), lambda t: t[:, 3:66]),
    "unaligned pointer": (randn(1129), lambda t: t[1:]),
    "transposed": (randn(144, 192), lambda t: t.T),
    "transposed, odd": (randn(127, 65), lambda t: t.T),
    "strided": (randn(17, 64), lambda t: t[:, ::3]),
    "three axes reversed": (randn(5, 7, 96), lambda t: t.permute(2, 1, 0)),
    "repeated rows": (randn(1, 48), lambda t: t.expand(9, 48)),
    "repeated heads": (randn(3, 1, 16, 32), lambda t: t.expand(3, 4, 16, 32)),
    "interleaved qkv": (randn(4, 6, 16, 64), lambda t: t[:, :4]),
    "five axes": (randn(2, 3, 4, 5, 32), lambda t: t.permute(3, 1, 0, 2, 4)),
    "empty": (randn(0, 16), lambda t: t),
}


@pytest.mark.parametrize("dtype", [*FLOATS, E4M3])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_shape(shape: str, source: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, view = SHAPES[shape]
    src = view(make(source))
    # Counting is code of its own for each kind, and compiling it takes a GPU's test run long.
    counted = shape in ("odd rows and columns", "transposed, odd", "strided", "full tiles")
    check(src, dtype, counting=(False, True) if counted else (False,))
    if shape in ("odd rows and columns", "transposed"):
        check(src, dtype, shift=1.0)
        if dtype is E4M3:
            check(src, dtype, quant=GivenScale(3.7))
            check(src, dtype, quant=GivenScale(torch.tensor([1.1], device=DEVICE)))


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[:24, 5:41],
        lambda t: t.T[:24, :36],
        lambda t: t[:48:2, :72:2],
        lambda t: t.view(-1)[: 24 * 36].view(24, 36),
    ],
)
def test_only_the_destination_view_is_written(cut: View) -> None:
    src = torch.randn(24, 36, device=DEVICE)
    dst, expected = (torch.full((80, 80), 7.0, device=DEVICE) for _ in range(2))
    fused_copy([Move(cut(dst), src)])
    fused_copy_ref([Move(cut(expected), src)])
    assert torch.equal(dst, expected)


def test_a_batch_of_mixed_kinds_and_its_counters() -> None:
    torch.manual_seed(1)
    sources = [
        torch.randn(130, 64, device=DEVICE, dtype=torch.bfloat16),
        torch.randn(5, device=DEVICE),
        torch.full((7, 16), 1e5, device=DEVICE),
        torch.tensor([1.0, float("nan"), float("inf"), 500.0], device=DEVICE),
    ]
    dtypes = [torch.float16, torch.float32, torch.float16, E4M3]
    moves = [Move(poisoned(*s.shape, dtype=d), s) for s, d in zip(sources, dtypes, strict=True)]
    counts = fused_copy(moves, count=True)
    assert counts is not None
    assert counts.tolist() == [[0, 0], [0, 0], [112, 0], [1, 2]]
    assert moves[3].dst.float().tolist()[2:] == [448.0, 448.0]
    assert moves[3].dst[1].isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, E4M3, torch.bfloat16])
def test_equal_dtypes_are_copied_bit_for_bit(dtype: torch.dtype) -> None:
    src = torch.randint(0, 256, (33, 64), dtype=torch.uint8, device=DEVICE).view(dtype)
    check(src.T, dtype)


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return codes.view(dtype).to(DEVICE)


@pytest.mark.parametrize("native", [True, False] if DEVICE == "cuda" else [False])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_all_codes_against_many_scales(source: torch.dtype, native: bool) -> None:
    src = all_codes(source)
    for dtype in FLOATS:
        check(src, dtype, native=native)
    scales = [2.0**e * f for e in range(-8, 8) for f in (1.0, 1.21, 1.37, 1.91)]
    assert len(scales) == 64
    for scale in scales if DEVICE == "cuda" else scales[::9]:
        check(src, E4M3, quant=GivenScale(scale), native=native)
    check(src, E4M3, native=native)


@pytest.mark.parametrize(("dst", "src"), [(0, 1), (1, 0)])
def test_moves_of_one_shape_need_not_be_aligned_alike(dst: int, src: int) -> None:
    """Each is of its own kind: what the compiler is told holds for all moves of a kind."""
    old = torch.randint(0, 256, (2, 4096 + 16), dtype=torch.uint8, device=DEVICE)
    new = torch.zeros_like(old)

    def move(number: int, dst: int, src: int) -> Move:
        target, source = new[number, dst : 4096 + dst], old[number, src : 4096 + src]
        return Move(target.view(8, 512), source.view(8, 512))

    moves = [move(0, 0, 0), move(1, dst, src)]
    batch = FusedCopy(moves)
    assert {launch.kind.vector for launch in batch.launches} == {True, False}
    batch.run()
    assert all(torch.equal(one.dst, one.src) for one in moves)


def test_rerun_reads_new_values() -> None:
    src = torch.randn(16, 32, device=DEVICE)
    dst = torch.empty_like(src)
    batch = FusedCopy([Move(dst, src)])
    batch.run()
    src.mul_(2)
    batch.run()
    assert torch.equal(dst, src)


@pytest.mark.parametrize("run", [fused_copy, fused_copy_ref])
def test_nothing_to_do(run: Callable[..., torch.Tensor | None]) -> None:
    empty = torch.empty(0, 4, device=DEVICE)
    for moves in ([], [Move(empty, empty)]):
        assert run(moves) is None
        counts = run(moves, count=True)
        assert counts is not None
        assert counts.tolist() == [[0, 0]] * len(moves)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 10 GB of GPU memory")
def test_more_than_two_billion_elements() -> None:
    size = 2**31 + 4099
    src = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    dst = torch.zeros_like(src)
    fused_copy([Move(dst, src)])
    assert torch.equal(dst, src)
    rows = 2**31 // 4096 + 8
    wide = torch.randint(0, 255, (4096, rows), dtype=torch.uint8, device=DEVICE)
    turned = torch.zeros(rows, 4096, dtype=torch.uint8, device=DEVICE)
    fused_copy([Move(turned, wide.T)])
    assert torch.equal(turned, wide.T)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernels natively")
def test_without_a_gpu_the_interpreter_is_what_ran() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"


def test_a_batch_follows_sources_that_moved() -> None:
    """Straight, staged (the block's rows are not contiguous) and grouped moves, in place."""
    flat = torch.randn(4, 200, 64, device=DEVICE)
    codes = torch.empty(200, 32, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.empty(2, 1, device=DEVICE)

    def moves(sources: torch.Tensor) -> list[Move]:
        return [
            Move(plain, sources[0]),
            Move(codes, sources[1][:, ::2], 0.0, BlockScale(scales, 32)),
            Move(whole, sources[2], 0.0, TensorScale(scale, amax)),
        ]

    plain = torch.empty(200, 64, device=DEVICE)
    whole = torch.empty(200, 64, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale, amax = torch.empty(1, device=DEVICE), torch.empty(1, device=DEVICE)
    batch = FusedCopy(moves(flat))
    batch.run()
    other = torch.randn_like(flat)
    assert batch.follow(moves(other))
    batch.run()
    results = (plain, codes, scales, whole, scale)
    found = [bits(one).clone() for one in results]
    fused_copy_ref(moves(other))
    for one, expected in zip(found, results, strict=True):
        assert torch.equal(one, bits(expected))
    odd = torch.zeros(flat.numel() + 1, device=DEVICE)[1:].view(flat.shape)
    assert not batch.follow(moves(odd))
