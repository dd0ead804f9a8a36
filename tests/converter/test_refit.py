"""Refits in one process: results, moved parameters, outputs, buckets."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.small_models import (
    State,
    assert_same_bits,
    experts_apart,
    random_state,
    small,
)

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.backend import ReferenceCopy
from fuseport.converter.errors import (
    FuseportWarning,
    MissingTensorError,
    RecipeError,
    ScaleError,
    ShapeError,
)
from fuseport.converter.refit import Refit
from fuseport.converter.shards import Place

DENSE = small(layers=2, hidden=160, heads=4, kv_channels=40, query_groups=2, ffn=160, vocab=50)
MOE = small(layers=2, hidden=32, heads=4, kv_channels=8, ffn=64, vocab=24, gated=True, experts=4)
PADDED = small(layers=1, hidden=16, heads=4, kv_channels=4, ffn=16, vocab=13, padded_vocab=16)
# As small as the interpreter needs it; its blocks straddle nothing but heads.
TINY = small(layers=2, hidden=48, heads=4, kv_channels=8, query_groups=2, ffn=32, vocab=10)
EMBEDDING = "embedding.word_embeddings.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INPUTS = {"*": {"input": 0.125}}
RECIPES = [
    Recipe(tp_size=2, pp_size=2),
    Recipe(tp_size=4, quant="fp8-row"),
    Recipe(target="hf"),
    Recipe(target="hf", quant="fp8"),
    Recipe(target="hf", quant="fp8-block"),
    Recipe(target="hf", quant="mxfp8"),
    Recipe(target="hf", quant="nvfp4", scales=INPUTS),
    Recipe(target="hf", quant="fp8", scales={"*": {"input": 0.125, "weight": 0.5}}),
    Recipe(tp_size=2, quant="fp8", scales=INPUTS),
    Recipe(target="hf", kv_cache="fp8", scales={"*": {"kv_cache": 0.25}}),
]


def spec(case: Case) -> ModelSpec:
    return ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))


def state(case: Case, seed: int = 0) -> State:
    return experts_apart(random_state(case, seed))


def state_for(backend: str, case: Case) -> State:
    """Triton runs on a GPU, or in its interpreter where there is none."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    return {name: value.cuda() if on_gpu else value for name, value in state(case).items()}


def assert_refitted(found: list[State], source: State, case: Case, recipe: Recipe) -> None:
    for one, other in zip(found, convert_state_dict(source, spec(case), recipe), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.target} {r.quant}")
@pytest.mark.parametrize("case", [DENSE, MOE], ids=["dense", "experts"])
def test_runs_follow_the_weights(case: Case, recipe: Recipe) -> None:
    source = state(case)
    refit = Refit(source, spec(case), recipe)
    first = refit.run()
    assert_refitted(first, source, case, recipe)
    for value in source.values():
        value.mul_(-1.5)
    again = refit.run()
    assert again is first
    assert_refitted(again, source, case, recipe)


def test_a_padded_vocabulary() -> None:
    source, recipe = state(PADDED), Recipe(tp_size=2, use_parallel_embedding=True)
    assert_refitted(Refit(source, spec(PADDED), recipe).run(), source, PADDED, recipe)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-block"])
def test_moved_parameters_are_found_and_the_old_ones_let_go(backend: str, quant: str) -> None:
    recipe = Recipe(target="hf", quant=quant)
    source = state_for(backend, TINY)
    refit = Refit(source, spec(TINY), recipe, backend=backend)
    (before,) = refit.run()
    memory = {name: tensor.data_ptr() for name, tensor in before.items()}
    gone = []
    # The embedding is looked at before the others.
    for name in [FC1, EMBEDDING, "decoder.layers.1.self_attention.linear_qkv.weight"]:
        gone.append(weakref.ref(source[name].untyped_storage()))
        source[name] = source[name] * 3
    (after,) = refit.run()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == memory
    assert_refitted([after], source, TINY, recipe)
    assert [one() for one in gone] == [None, None, None]


class Seen(dict[str, torch.Tensor]):
    """A state dict that notes what is looked at."""

    def __init__(self, tensors: State, log: list[str]) -> None:
        super().__init__(tensors)
        self.log = log

    def __getitem__(self, name: str) -> torch.Tensor:
        self.log.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("quant", ["none", "fp8-block"])
def test_work_begins_before_all_parameters_are_looked_at(
    quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    source = Seen(state(DENSE), log)
    refit = Refit(source, spec(DENSE), Recipe(target="hf", quant=quant))
    refit.run()
    monkeypatch.setattr(ReferenceCopy, "run", lambda self, reduce: log.append("launch"))
    log.clear()
    refit.run()
    launches = [place for place, name in enumerate(log) if name == "launch"]
    first, others = set(log[: launches[0]]), set(log[launches[0] :]) - {"launch"}
    assert 0 < len(first) <= len(source) // 8
    assert not first & others
    assert first | others == source.keys()
    assert len(launches) == 2
    assert launches[1] == len(log) - 1


def test_a_parameter_without_memory_is_refused() -> None:
    source = state(DENSE)
    refit = Refit(source, spec(DENSE), Recipe(target="hf"))
    refit.run()
    source[FC1].untyped_storage().resize_(0)
    with pytest.raises(MissingTensorError, match=f"{FC1} has no memory"):
        refit.run()


def test_a_parameter_whose_data_is_exchanged() -> None:
    source = {name: torch.nn.Parameter(value) for name, value in state(DENSE).items()}
    recipe = Recipe(target="hf")
    refit = Refit(source, spec(DENSE), recipe)
    refit.run()
    source[FC1].data = torch.randn_like(source[FC1])
    plain = {name: value.detach() for name, value in source.items()}
    assert_refitted(refit.run(), plain, DENSE, recipe)


@pytest.mark.parametrize("offset", [8, 1])
def test_a_parameter_moved_to_an_odd_address(offset: int) -> None:
    """Other code is needed where 16 bytes can no longer be read at once."""
    source, recipe = state_for("triton", TINY), Recipe(target="hf")
    refit = Refit(source, spec(TINY), recipe, backend="triton")
    refit.run()
    flat = torch.zeros(source[FC1].numel() + offset, device=source[FC1].device)
    flat[offset:] = source[FC1].flatten() + 1
    source[FC1] = flat[offset:].view(source[FC1].shape)
    assert_refitted(refit.run(), source, TINY, recipe)


def test_another_state_dict_from_now_on() -> None:
    recipe = Recipe(tp_size=2)
    refit = Refit(state(DENSE), spec(DENSE), recipe)
    other = state(DENSE, seed=7)
    assert_refitted(refit.run(other), other, DENSE, recipe)
    other[FC1].mul_(2)
    assert_refitted(refit.run(), other, DENSE, recipe)


def test_a_parameter_of_another_kind_is_refused() -> None:
    source = state(DENSE)
    refit = Refit(source, spec(DENSE), Recipe(target="hf"))
    source[FC1] = source[FC1][:-1].clone()
    with pytest.raises(ShapeError, match=FC1):
        refit.run()
    del source[FC1]
    with pytest.raises(MissingTensorError, match="no longer has"):
        refit.run()


def test_the_caller_s_outputs_are_written() -> None:
    source, recipe = state(DENSE), Recipe(target="hf")
    (like,) = convert_state_dict(source, spec(DENSE), recipe)
    mine = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    (found,) = Refit(source, spec(DENSE), recipe, outputs=[mine]).run()
    assert all(found[name] is mine[name] for name in mine)
    assert_same_bits(mine, like)
    mine["model.norm.weight"] = mine["model.norm.weight"].float()
    with pytest.raises(ShapeError, match=r"model\.norm\.weight"):
        Refit(source, spec(DENSE), recipe, outputs=[mine]).run()


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-block", "nvfp4"])
def test_buckets_share_one_buffer(quant: str) -> None:
    scales = INPUTS if quant == "nvfp4" else None
    recipe, limit = Recipe(target="hf", quant=quant, scales=scales), 60_000
    source = state(DENSE)
    refit = Refit(source, spec(DENSE), recipe)
    for seed in (1, 2):
        for name, value in state(DENSE, seed).items():
            source[name].copy_(value)
        seen: State = {}
        buffers: set[int] = set()
        for bucket in refit.buckets(limit):
            names = [name for name, _ in bucket]
            size = sum(tensor.nbytes for _, tensor in bucket)
            fused = {name.rsplit(".", 2)[0] for name in names}
            assert size <= limit or len(fused) == 1
            buffers |= {tensor.untyped_storage().data_ptr() for _, tensor in bucket}
            seen |= {name: tensor.clone() for name, tensor in bucket}
        assert len(buffers) == 1
        assert_refitted([seen], source, DENSE, recipe)
    # Buckets go after moved parameters too.
    source[FC1] = source[FC1] + 1
    seen = {name: tensor.clone() for bucket in refit.buckets(limit) for name, tensor in bucket}
    assert_refitted([seen], source, DENSE, recipe)


def test_what_cannot_be_is_refused() -> None:
    source, facts = state(DENSE), spec(DENSE)
    with pytest.raises(RecipeError, match="same names"):
        next(Refit(source, facts, Recipe(tp_size=2)).buckets(1000))
    ((_, tensor), *_) = next(Refit(source, facts, Recipe(tp_size=2), wants=[1]).buckets(1000))
    assert tensor.numel()
    with pytest.raises(RecipeError, match="there are 2"):
        Refit(source, facts, Recipe(tp_size=2), wants=[2])
    with pytest.raises(RecipeError, match=r"ranks \[0, 1\] share scales .* fills rank 0"):
        Refit(source, facts, Recipe(tp_size=2, quant="fp8", scales=INPUTS), wants=[1])
    with pytest.raises(RecipeError, match="Transformer Engine changes its scales"):
        Refit(source, facts, Recipe(target="hf", quant="fp8", scales="source"))
    with pytest.raises(ScaleError, match="no module"):
        Refit(source, facts, Recipe(target="hf", quant="fp8", scales={"x": {"input": 1.0}}))
    with pytest.warns(FuseportWarning, match="no scales of the KV cache"):
        Refit(source, facts, Recipe(kv_cache="fp8"))
    with pytest.raises(RecipeError, match="graph"):
        Refit(source, facts, Recipe(tp_size=2), graph=True)
    with pytest.raises(RecipeError, match="tp_rank 2"):
        Place(tp_size=2, tp_rank=2)
    with pytest.raises(RecipeError, match="go together"):
        Place(expert_tp_size=2)


def test_a_rank_that_is_missing_is_noticed() -> None:
    with pytest.raises(RecipeError, match=r"tp_size 2 .* the group has 1"):
        Refit(state(DENSE), spec(DENSE), Recipe(tp_size=2), place=Place(tp_size=2))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-block", "mxfp8"])
def test_a_captured_graph_follows_weights_and_addresses(quant: str) -> None:
    recipe = Recipe(target="hf", quant=quant)
    source = {name: value.cuda() for name, value in state(DENSE).items()}
    refit = Refit(source, spec(DENSE), recipe, graph=True)
    for step in range(4):
        assert_refitted(refit.run(), source, DENSE, recipe)
        for value in source.values():
            value.add_(0.25)
        if step == 1:
            source[FC1] = source[FC1] * 2


@pytest.mark.gpu
@needs_gpu
def test_a_run_does_not_wait_for_the_gpu() -> None:
    source = {name: value.cuda() for name, value in state(DENSE).items()}
    refit = Refit(source, spec(DENSE), Recipe(target="hf", quant="fp8"))
    refit.run()
    with warnings.catch_warnings():
        # It says that it does not yet see all that wait.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        refit.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
