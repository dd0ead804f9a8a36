"""Fuseport beside other ways to do the same work: the same weights, process and card.

    python -m benchmarks.run peers

The linear weights and norms of one rank, GPU → GPU, into the Hugging Face layout. Fuseport's result
is compared with the reference bit for bit, and each peer's with fuseport's: what is not equal (or,
where a peer rounds otherwise, at most one code apart) has no figure. Times are those of a warm
call; `fresh` times a new process to its first result.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .conftest import Bench, Timed, checked
from .measure import seconds
from .models import LLAMA_70B, QWEN3_235B_EP8, TOY_PEER, TOY_PEER_MOE, of_rank
from .peers import ALL, PEERS, apart, own_matrices
from .work import Case, Work

TP = 8
ON_GPU = torch.cuda.is_available()
DENSE = LLAMA_70B if ON_GPU else TOY_PEER
MOE = QWEN3_235B_EP8 if ON_GPU else TOY_PEER_MOE
CASES = (Case("dense rank", of_rank(DENSE, TP)), Case("expert rank", MOE))
WORKS = [(case, scheme) for case in CASES for scheme in ALL]


@pytest.fixture(scope="module", params=WORKS, ids=lambda pair: f"{pair[0].name}: {pair[1]}")
def work(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Work]:
    """Weights of a rank's layers and a checked plan."""
    case, scheme = request.param
    made = checked(bench, case, scheme, lambda name: name.startswith("decoder."))
    made.whole = None if case.spec.num_moe_experts else (DENSE, TP)
    yield made
    torch._dynamo.reset()


def test_fuseport(work: Work, timed: Timed) -> None:
    """The launches of a kept plan; ratios are to this."""
    timed(work.case.name, work.scheme, "fuseport", work.moved_bytes, work.batch.run)


def test_fuseport_anew(work: Work, timed: Timed) -> None:
    """Plan, tables and launches, each time."""

    def run() -> object:
        anew = work.anew()
        work.copier(anew.moves, anew.repeats).run()
        return anew

    timed(
        work.case.name, work.scheme, "fuseport, planned anew", work.moved_bytes, run,
        work.stages(), rounds=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_peer(name: str, work: Work, timed: Timed, bench: Bench) -> None:
    """One other way."""
    peer = PEERS[name]
    if work.scheme not in peer.schemes:
        pytest.skip("knows other schemes")
    if peer.needs_gpu and bench.is_toy:
        pytest.skip("needs a GPU")
    try:
        made = []
        ready = seconds(lambda: made.append(peer.make(work)))
        first = seconds(made[0])
    except Exception as error:
        pytest.skip(f"cannot be run here: {type(error).__name__}: {error}")
    run = made[0]
    share = apart(peer.read(work, run()), own_matrices(work), peer.exact)
    if share is None:
        pytest.fail("RED: not fuseport's result; no figure")
    timed(
        work.case.name, work.scheme, name, work.moved_bytes, run,
        {"codes_apart": share, "first_call": ready + first}, rounds=peer.rounds, warmup=1,
    )  # fmt: skip
