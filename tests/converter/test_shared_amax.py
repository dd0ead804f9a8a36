"""Scales of whole weights over tensor-parallel ranks: the bits of the whole model in one place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fuseport_testing
import pytest
import torch
from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.dropin import convert_case, shards
from fuseport_testing.forked import torchrun
from fuseport_testing.megatron_reference import transformer_config
from fuseport_testing.small_models import State, assert_same_bits, random_state, small

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.errors import RecipeError

WORKER = Path(fuseport_testing.__path__[0]) / "amax_worker.py"
DENSE = small(hidden=16, heads=4, kv_channels=4, query_groups=4, ffn=24, layers=2, vocab=16)
MOE = small(hidden=16, heads=4, kv_channels=4, ffn=24, experts=4, moe_ffn=8, vocab=16)
RECIPE: dict[str, Any] = {"quant": "fp8", "scales": {"*": {"input": 0.25}}}
# Case, tp, ep, and the weights with a scale: two attention and two MLP ones, or two for an expert.
JOBS = ((DENSE, 2, 1, 8), (DENSE, 4, 1, 8), (MOE, 4, 1, 10), (MOE, 4, 2, 10), (MOE, 2, 2, 10))


def whole(case: Case, tp: int, ep: int, recipe: dict[str, Any]) -> list[State]:
    """Every rank's tensors of the whole model, converted in one process."""
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))
    sizes: dict[str, Any] = {"tp_size": tp, "moe_ep_size": ep, "use_parallel_embedding": True}
    return convert_state_dict(random_state(case), spec, Recipe(**sizes, **recipe))


def job(case: Case, tp: int, ep: int) -> dict[str, Any]:
    plain = (int, str, float, list, type(None))
    config = {k: v for k, v in vars(transformer_config(case)).items() if isinstance(v, plain)}
    return {
        "tp": tp, "ep": ep, "config": config, "vocab": case.vocab, "recipe": RECIPE,
        "shards": shards(case, tp, ep=ep),
    }  # fmt: skip


def test_ranks_reduce_amaxes_and_nothing_else(tmp_path: Path) -> None:
    """Groups of two and of four processes, each with its own shards alone."""
    torch.save([job(*one[:3]) for one in JOBS], tmp_path / "jobs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = torchrun(4, str(WORKER), str(tmp_path), environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(4)]
    for number, (case, tp, ep, groups) in enumerate(JOBS):
        expected = whole(case, tp, ep, RECIPE)
        for rank, of_all in enumerate(results):
            assert_same_bits(of_all[number]["tensors"], expected[rank % tp])
            assert of_all[number]["numbers"] == groups


def test_without_a_group_a_shared_scale_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"2 tensor-parallel ranks.*give tp_group"):
        convert_case(DENSE, 2, quantisation=Recipe(**RECIPE))


def test_one_rank_and_given_scales_need_no_group() -> None:
    (found,) = convert_case(DENSE, 1, quantisation=Recipe(**RECIPE), dtype="bfloat16")
    assert_same_bits(found, whole(DENSE, 1, 1, RECIPE)[0])
    recipe: dict[str, Any] = {"quant": "fp8", "scales": {"*": {"input": 0.25, "weight": 0.01}}}
    ranks = convert_case(DENSE, 2, quantisation=Recipe(**recipe), dtype="bfloat16")
    for rank, expected in zip(ranks, whole(DENSE, 2, 1, recipe), strict=True):
        assert_same_bits(rank, expected)


def test_scales_of_rows_are_a_rank_s_own() -> None:
    """A row that ranks share by columns has a scale on each of them, of the part that is there."""
    recipe: dict[str, Any] = {"quant": "fp8-row"}
    ranks = convert_case(DENSE, 2, quantisation=Recipe(**recipe), dtype="bfloat16")
    for rank, expected in zip(ranks, whole(DENSE, 2, 1, recipe), strict=True):
        assert_same_bits(rank, expected)
    weight = random_state(DENSE)["decoder.layers.0.mlp.linear_fc2.weight"]
    for found, part in zip(ranks, weight.chunk(2, 1), strict=True):
        scale = found["transformer.layers.0.mlp.proj.per_channel_scale"]
        assert torch.equal(scale, part.abs().amax(1) / 448)


def test_states_of_training_are_not_read_from_shards() -> None:
    with pytest.raises(RecipeError, match="'source' is not read from shards"):
        convert_case(DENSE, 1, quantisation=Recipe(quant="fp8", scales="source"))
