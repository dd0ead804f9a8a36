"""The rules against the eager oracle, which shares no rule with them: bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fuseport_testing.cases import BY_NAME, CASES, Case, megatron_args
from fuseport_testing.megatron_models import Run
from fuseport_testing.oracle import oracle_trtllm
from fuseport_testing.spellings import with_grouped_experts, with_te_norms

from fuseport.converter import ModelSpec, Recipe, convert_state_dict

Runs = Callable[..., Run]
State = dict[str, torch.Tensor]
NAMES = [case.name for case in CASES]
MOE = [case.name for case in CASES if case.experts]
SIZES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)]


def spec_of(case: Case) -> ModelSpec:
    # Megatron's arguments do not say that a model is a Falcon.
    model_type = "falcon" if case.name == "falcon" else None
    return ModelSpec.from_facts(vars(megatron_args(case, 1, 1)), model_type=model_type)


def inexact(state: State) -> State:
    """Values that bf16 does not hold, so that rounding is tested too."""
    torch.manual_seed(0)
    return {
        name: value + 1e-3 * torch.randn(value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_equal(found: list[State], expected: list[State]) -> None:
    assert [set(rank) for rank in found] == [set(rank) for rank in expected]
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, tensor in ours.items():
            where = f"rank {rank} {name}"
            assert tensor.dtype == theirs[name].dtype, where
            assert tensor.shape == theirs[name].shape, where
            assert torch.equal(tensor, theirs[name]), where


@pytest.mark.parametrize(("tp", "pp"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_and_split(name: str, tp: int, pp: int, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    pp = min(pp, case.layers)
    state = inexact(megatron_run(name).state())
    before = {key: value.clone() for key, value in state.items()}
    recipe = Recipe(tp_size=tp, pp_size=pp)
    found = convert_state_dict(state, spec_of(case), recipe)
    assert_equal(found, oracle_trtllm(state, case, tp, pp, torch.bfloat16, case.vocab))
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["gpt", "mixtral", "nemotron"])
def test_dtypes(name: str, dtype: str, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    state = inexact(megatron_run(name).state())
    found = convert_state_dict(state, spec_of(case), Recipe(tp_size=2, dtype=dtype))
    expected = oracle_trtllm(state, case, 2, 1, getattr(torch, dtype), case.vocab)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_parallel_embedding_and_vocabulary(name: str, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    state = inexact(megatron_run(name).state())
    for vocab in (61, 64, 33):
        spec = spec_of(case).replace(vocab_size=vocab)
        recipe = Recipe(tp_size=4, use_parallel_embedding=True)
        expected = oracle_trtllm(state, case, 4, 1, torch.bfloat16, vocab, True)
        assert_equal(convert_state_dict(state, spec, recipe), expected)


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("name", MOE)
def test_experts_on_different_ranks(name: str, ep: int, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    state = inexact(megatron_run(name).state())
    found = convert_state_dict(state, spec_of(case), Recipe(tp_size=4, moe_ep_size=ep))
    expected = oracle_trtllm(state, case, 4, 1, torch.bfloat16, case.vocab, moe_ep=ep)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt", "qwen2_moe"])
def test_transformer_engine_spellings(name: str, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    state = inexact(megatron_run(name).state())
    other = {f"module.module.{key}": value for key, value in with_te_norms(state).items()}
    recipe = Recipe(tp_size=2)
    expected = convert_state_dict(state, spec_of(case), recipe)
    assert_equal(convert_state_dict(other, spec_of(case), recipe), expected)


@pytest.mark.parametrize("kind", ["te", "legacy"])
@pytest.mark.parametrize("name", MOE)
def test_other_expert_layouts(name: str, kind: str, megatron_run: Runs) -> None:
    case = BY_NAME[name]
    state = inexact(megatron_run(name).state())
    recipe = Recipe(tp_size=2)
    expected = convert_state_dict(state, spec_of(case), recipe)
    grouped = with_grouped_experts(state, kind)
    assert_equal(convert_state_dict(grouped, spec_of(case), recipe), expected)


def test_the_kernel_gives_the_same(megatron_run: Runs) -> None:
    case = BY_NAME["mixtral"]
    state = inexact(megatron_run("mixtral").state())
    grouped = with_grouped_experts(state, "legacy")
    if torch.cuda.is_available():
        grouped = {name: tensor.cuda() for name, tensor in grouped.items()}
    recipe = Recipe(tp_size=2)
    expected = convert_state_dict(grouped, spec_of(case), recipe, backend="torch")
    assert_equal(convert_state_dict(grouped, spec_of(case), recipe, backend="triton"), expected)
