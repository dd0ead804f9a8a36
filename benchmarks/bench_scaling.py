"""How time grows: with the bytes of a model, with its number of tensors, and with tp.

    python -m benchmarks.run scaling

Sizes go up to what a card of 80 GB holds. Above that results go, as in a refit, through buckets of
4 GiB. Each result is checked before a figure is shown.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fuseport.converter import ModelSpec

from .bench_models import WAYS
from .conftest import Bench, Timed, checked
from .models import LLAMA_8B, LLAMA_70B, TOY, TOY_PEER, of_rank
from .peers import apart
from .plain_torch import converter, hf_modules, linears
from .work import Case, Work

ON_GPU = torch.cuda.is_available()
GB = 10**9
BUCKET = 4 << 30 if ON_GPU else 1 << 18
# A rank of a dense model; next to no vocabulary, so that layers alone make its size.
RANK = of_rank(LLAMA_70B if ON_GPU else TOY_PEER, 8).replace(vocab_size=1024)
WHOLE_SIZES = (1, 4, 16, 48) if ON_GPU else (1e-3,)
BUCKET_SIZES = (1, 4, 16, 60) if ON_GPU else (1e-3,)
WIDTHS = (8192, 4096, 2048, 1024) if ON_GPU else (128, 64)
TPS = (1, 2, 4, 8) if ON_GPU else (1, 2)
WARM_AND_FIRST = ("warm launch", "first call")


def layers_of(spec: ModelSpec, size: float) -> int:
    """So many layers that the source has about `size` GB."""
    one, two = (source_bytes(spec.replace(num_layers=n)) for n in (1, 2))
    return max(1, round((size * GB - (2 * one - two)) / (two - one)))


def source_bytes(spec: ModelSpec) -> int:
    """Bytes of a model in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in Case("", spec).shapes().values())


def by_size(size: float) -> Case:
    """The rank with so many layers that its source has `size` GB."""
    return Case(f"dense, {size:g} GB", RANK.replace(num_layers=layers_of(RANK, size)))


def by_width(width: int) -> Case:
    """The same bytes in more and smaller tensors."""
    shrink = max(WIDTHS) // width
    spec = RANK.replace(
        num_layers=20 * shrink**2 if ON_GPU else shrink**2,
        hidden_size=RANK.hidden_size // shrink,
        ffn_hidden_size=RANK.ffn_hidden_size // shrink,
        num_attention_heads=max(RANK.num_query_groups, RANK.num_attention_heads // shrink),
    )
    return Case(f"dense, hidden size {width}", spec)


def by_tp(tp: int) -> Case:
    """A whole model for so many ranks."""
    return Case(f"llama-3-8b to tp {tp}", LLAMA_8B if ON_GPU else TOY, "trtllm", tp)


def known(work: Work, **more: float) -> dict[str, float]:
    """What a plot is drawn against."""
    return {"source_bytes": work.source_bytes, "tensors": len(work.weights), **more}


@pytest.mark.parametrize("way", ["warm launch", "kept plan, CUDA graph"])
@pytest.mark.parametrize("size", WHOLE_SIZES)
def test_size(size: float, way: str, timed: Timed, bench: Bench) -> None:
    """The launches against the source's bytes."""
    if bench.is_toy and "graph" in way:
        pytest.skip("a CUDA graph needs a GPU")
    work = checked(bench, by_size(size), "given")
    run = WAYS[way](work)
    timed(work.case.name, "given", way, work.moved_bytes, run, known(work))


def buckets_match(work: Work, buckets: Iterator[list[tuple[str, torch.Tensor]]]) -> bool:
    """True if all linear weights come, in order, as plain torch makes them.

    A GPU's torch rounds a scale otherwise, so a few codes may be one step apart.
    """
    convert, unused = converter("block"), torch.empty(0)
    groups, head = work.spec.num_query_groups, work.spec.kv_channels
    made = (
        matrix
        for kind, value in linears(work.weights)
        for matrix, _ in convert(value, kind, groups, head, unused)
    )
    names = {f"{module}.weight" for module in hf_modules(work.weights)}
    # The buffer is filled anew for each bucket, so a bucket is compared before the next.
    found = (tensor for bucket in buckets for name, tensor in bucket if name in names)
    pairs = zip(found, made, strict=True)
    return all(apart([(a, None)], [(b, None)], exact=False) is not None for a, b in pairs)


@pytest.mark.parametrize("size", BUCKET_SIZES)
def test_size_in_buckets(size: float, bench: Bench, timed: Timed) -> None:
    """A refit through one buffer: the results need not fit beside the source."""
    bench.measure_copy()
    work = Work(by_size(size), "block", bench.device)
    refit = work.refit(own_outputs=False)
    if not buckets_match(work, refit.buckets(BUCKET)):
        pytest.fail("RED: not what plain torch gives; no figure")
    sizes = (sum(t.nbytes for _, t in bucket) for bucket in refit.buckets(BUCKET))
    nbytes = work.source_bytes + sum(sizes)

    def run() -> None:
        for _ in refit.buckets(BUCKET):
            pass

    timed(work.case.name, "block", "buckets", nbytes, run, known(work), rounds=10)


@pytest.mark.parametrize("way", WARM_AND_FIRST)
@pytest.mark.parametrize("width", WIDTHS)
def test_tensors(width: int, way: str, timed: Timed, bench: Bench) -> None:
    """A number of tensors that grows sixty-fourfold, of the same bytes in all."""
    work = checked(bench, by_width(width), "given")
    nbytes, details = work.moved_bytes, known(work, **work.stages())
    run = WAYS[way](work)
    timed(work.case.name, "given", way, nbytes, run, details, rounds=7)


@pytest.mark.parametrize("way", WARM_AND_FIRST)
@pytest.mark.parametrize("tp", TPS)
def test_tp(tp: int, way: str, timed: Timed, bench: Bench) -> None:
    """One whole model for more and more ranks."""
    work = checked(bench, by_tp(tp), "bf16")
    nbytes, details = work.moved_bytes, known(work, tp=tp, **work.stages())
    run = WAYS[way](work)
    timed(work.case.name, "bf16", way, nbytes, run, details, rounds=7)
