"""The drop-in beside Megatron-Core's own converter: one rank, results on the GPU and on the host.

    python -m benchmarks.run host

Both convert one state dict to e4m3; the results are compared bit for bit before a figure is shown.
Megatron-Core puts its results into pinned host memory, a buffer for each, as it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel

from .bench_peers import DENSE, TP
from .conftest import Bench, Timed
from .measure import Run, seconds
from .megatron_peer import config, converter, scales
from .models import of_rank, random_weights, shapes
from .work import QUANT_SCALE, same_bits

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(bench: Bench) -> State:
    """One rank's decoder."""
    pytest.importorskip("megatron.core")
    bench.measure_copy()
    wanted = {n: s for n, s in shapes(of_rank(DENSE, TP)).items() if n.startswith("decoder.")}
    return random_weights(wanted, bench.device)


def ours(state: State, output: str, device: torch.device) -> Run:
    """Fuseport's conversion, by one converter that is used again."""
    given: Any = scales(DENSE.num_layers, QUANT_SCALE, device)
    made = DistributedTRTLLMModelWeightsConverter(
        config(DENSE), "bfloat16", activation="swiglu", parallel=Parallel(TP, 0), scales=given,
        output=output,
    )  # fmt: skip

    def convert() -> State:
        made.convert(state, {}, DENSE.vocab_size or 0)
        return made.trtllm_model_weights

    return convert


def is_same(one: State, other: State) -> bool:
    """Bit equality, name by name, wherever they are; Megatron's are transposed views."""
    return one.keys() == other.keys() and all(
        same_bits(one[name].cpu(), other[name].contiguous().cpu()) for name in one
    )


@pytest.mark.parametrize("way", ["fuseport", "Megatron-Core"])
@pytest.mark.parametrize("output", ["cuda", "host"])
def test_drop_in(output: str, way: str, state: State, timed: Timed, bench: Bench) -> None:
    """A first call, then warm ones."""
    device = bench.device
    if not bench.is_toy:
        # Pinned memory of an earlier test would make a first call a second one.
        torch._C._host_emptyCache()
    if bench.is_toy and output == "host":
        pytest.skip("needs a GPU, and its pinned memory")
    where = device if output == "cuda" else None
    own = ours(state, output, device)
    theirs = converter(state, DENSE, TP, QUANT_SCALE, where)
    run = own if way == "fuseport" else theirs
    first = seconds(run)
    found, expected = own(), theirs()
    if not is_same(found, expected):  # type: ignore[arg-type]
        pytest.fail("RED: the results differ; no figure")
    size = sum(tensor.nbytes for tensor in expected.values())
    source = sum(tensor.nbytes for tensor in state.values())
    del found, expected
    timed(
        f"dense rank, to {output}", "given", way, source + size, run, {"first_call": first},
        rounds=3, warmup=0,
    )  # fmt: skip
