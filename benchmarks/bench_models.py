"""Whole models and ranks of models: the first call, a kept plan, and the launches alone.

    python -m benchmarks.run models

GPU → GPU. Each result is compared with the reference bit for bit before a figure is shown.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fuseport.converter import ModelSpec

from .conftest import Bench, Timed, checked
from .measure import Run
from .models import LLAMA_8B, LLAMA_70B, QWEN3_235B_EP8, TOY, TOY_MOE, of_rank
from .work import SCHEMES, Case, Work

DENSE, MOE = of_rank(LLAMA_70B, 8), QWEN3_235B_EP8
# The same number of tensors as all 94 layers have, at a sixteenth of their bytes.
NARROW = QWEN3_235B_EP8.replace(
    num_layers=94, hidden_size=1024, num_attention_heads=16, num_query_groups=1,
    moe_ffn_hidden_size=384,
)  # fmt: skip
UNIFIED = ("bf16", "given")


def of_target(name: str, spec: ModelSpec, tp_size: int, *schemes: str) -> list[tuple[Case, str]]:
    """Schemes that the unified checkpoint holds go there, the others into the HF layout."""
    return [
        (Case(name, spec, "trtllm", tp_size) if scheme in UNIFIED else Case(name, spec), scheme)
        for scheme in schemes
    ]


FULL = [
    *of_target("llama-3-8b to tp 8", LLAMA_8B, 8, "bf16", "given"),
    *of_target("llama-3-70b rank", DENSE, 1, *SCHEMES),
    *of_target("qwen3-235b rank", MOE, 1, *SCHEMES),
    *of_target("qwen3-235b rank, narrow", NARROW, 1, "block"),
]
TOYS = [
    *of_target("toy to tp 2", TOY, 2, "bf16", "given"),
    *of_target("toy moe", TOY_MOE, 1, *SCHEMES),
]
WORKS = FULL if torch.cuda.is_available() else TOYS


@pytest.fixture(scope="module", params=WORKS, ids=lambda pair: f"{pair[0].name}: {pair[1]}")
def work(request: pytest.FixtureRequest, bench: Bench) -> Work:
    """Weights and a checked plan."""
    return checked(bench, *request.param)


# From what is done least to what is done anew: a first call needs the memory of the others.
WAYS: dict[str, Callable[[Work], Run]] = {
    "warm launch": lambda work: work.batch.run,
    "kept plan": lambda work: work.refit().run,
    "kept plan, CUDA graph": lambda work: work.refit(graph=True).run,
    "first call": Work.first_call,
}


@pytest.mark.parametrize("way", WAYS)
def test_way(way: str, work: Work, timed: Timed, bench: Bench) -> None:
    """One way to convert."""
    if bench.is_toy and "graph" in way:
        pytest.skip("a CUDA graph needs a GPU")
    nbytes, first = work.moved_bytes, way == "first call"
    run = WAYS[way](work)
    details = work.stages() if first else {}
    details |= {"tensors": len(work.weights), "source_bytes": work.source_bytes}
    timed(work.case.name, work.scheme, way, nbytes, run, details, rounds=7 if first else 20)
