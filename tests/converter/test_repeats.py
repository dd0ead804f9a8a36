"""A conversion by patterns: what is repeated is what planning every tensor by itself gives."""

from __future__ import annotations

import pytest
import torch
from fuseport_testing.cases import megatron_args
from fuseport_testing.small_models import random_state, small

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.alike import Alike
from fuseport.converter.repeats import Repeats
from fuseport.converter.sources.megatron import read_model
from fuseport.converter.state import plan_memory, prepare, run_plan
from fuseport.kernels.move import GivenScale

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = small(
    hidden=32, heads=4, query_groups=2, kv_channels=16, ffn=64, experts=4, moe_ffn=32, layers=4
)
RECIPES = {
    "plain": Recipe(target="trtllm", tp_size=2, pp_size=2),
    "experts over ranks": Recipe(target="trtllm", tp_size=2, moe_ep_size=2),
    "one scale": Recipe(target="hf", quant="fp8"),
    "given": Recipe(
        target="hf", quant="fp8", kv_cache="fp8",
        scales={f"*layers.{n}.*": {"weight": 2.0**-n, "input": 0.5, "kv_cache": 0.25 + n}
                for n in range(4)},
    ),
    "two scales": Recipe(target="hf", quant="nvfp4", exclude=("lm_head", "*.layers.1.*")),
    "blocks": Recipe(target="hf", quant="fp8-block", keep_last=1),
}  # fmt: skip


def _elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same one element behind the beginning of its memory."""
    return torch.cat([tensor.new_zeros(1), tensor.view(-1)])[1:].view(tensor.shape)


@pytest.mark.filterwarnings("ignore:no scales of the KV cache|no static scales")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_bit_is_planned_alone(recipe: Recipe) -> None:
    """Two layers hold a tensor in another way: by its strides, and by where it begins."""
    spec = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
    weights = {name: tensor.to(DEVICE) for name, tensor in random_state(CASE).items()}
    turned = "decoder.layers.2.self_attention.linear_proj.weight"
    weights[turned] = weights[turned].T.contiguous().T
    behind = "decoder.layers.3.mlp.router.weight"
    weights[behind] = _elsewhere(weights[behind])
    # In plain torch each time has its own moves, and would be right whatever it follows.
    found = convert_state_dict(weights, spec, recipe, backend="triton")
    plan = plan_memory(weights, read_model(weights, spec), spec, recipe)
    run_plan(plan, "torch")
    assert [list(rank) for rank in found] == [
        [one.name for one in plan if one.rank == rank] for rank in range(recipe.world_size)
    ]
    for one in plan:
        tensor = found[one.rank][one.name]
        assert tensor.dtype is one.dst.dtype
        assert tensor.shape == one.dst.shape
        bits = (each.reshape(-1).view(torch.uint8) for each in (tensor, one.dst))
        assert torch.equal(*bits), one.name


def test_few_moves_are_made_for_many_layers() -> None:
    """One of each kind; a layer's given scale is its own and does not make another kind."""
    spec = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
    weights = random_state(CASE)
    scales = {f"transformer.layers.{n}.attention.dense": GivenScale(2.0 + n) for n in range(4)}
    alike = Alike(weights, spec)
    assert alike.first == {1: 0, 2: 0, 3: 0}
    assert not any("layers.1." in name for name in alike.others)
    model = read_model(alike.others, spec, alike=alike.first)
    targets, make = prepare(weights, model, spec, Recipe(), scales)
    work = Repeats(make, alike).work(targets)
    repeated = sum(len(one.times) * len(one.moves) for one in work.repeats)
    assert len(work.moves) + repeated == sum(len(one.moves) for one in plan_memory(
        weights, model, spec, Recipe(), scales
    ))  # fmt: skip
    assert len(work.moves) < repeated / 2
    given = [one for one in work.repeats if isinstance(one.moves[0].quant, GivenScale)]
    assert [[time.quant_scale for time in one.times] for one in given] == [[3.0, 4.0, 5.0]]


def _same(weights: dict[str, torch.Tensor], scales: dict[str, GivenScale] | None = None) -> None:
    """A conversion gives what planning each tensor by itself gives."""
    spec = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
    (found,) = convert_state_dict(weights, spec, Recipe(), scales=scales, backend="triton")
    plan = plan_memory(weights, read_model(weights, spec), spec, Recipe(), scales)
    run_plan(plan, "torch")
    assert sorted(found) == sorted(one.name for one in plan)
    for one in plan:
        bits = (each.reshape(-1).view(torch.uint8) for each in (found[one.name], one.dst))
        assert torch.equal(*bits), one.name


def _weights() -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in random_state(CASE).items()}


def test_scales_that_are_tensors_follow_no_pattern() -> None:
    names = [f"transformer.layers.{n}.{m}" for n in range(4) for m in ("attention.qkv", "mlp.proj")]
    scales = {
        name: GivenScale(torch.tensor([2.0**-n], device=DEVICE)) for n, name in enumerate(names)
    }
    _same(_weights(), scales)


def test_parameters_of_one_buffer_are_told_apart() -> None:
    """As a distributed optimizer keeps them: views, one behind the other, in any order."""
    weights = _weights()
    buffer = torch.cat([weights[name].reshape(-1) for name in sorted(weights, reverse=True)])
    start = 0
    for name in sorted(weights, reverse=True):
        size, shape = weights[name].numel(), weights[name].shape
        weights[name] = buffer[start : start + size].view(shape)
        start += size
    spec = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
    assert Alike(weights, spec).first
    _same(weights)


def test_a_layer_whose_tensors_overlap_stands_for_itself_alone() -> None:
    weights = _weights()
    for layer in range(4):
        prefix = f"decoder.layers.{layer}."
        weights[prefix + "pre_mlp_layernorm.weight"] = weights[prefix + "input_layernorm.weight"]
    spec = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
    alike = Alike(weights, spec)
    assert not alike.first
    assert alike.others.keys() == weights.keys()
    _same(weights)
