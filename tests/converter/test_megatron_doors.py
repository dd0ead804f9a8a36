"""The reference's private methods, one tensor at a time: some scripts call them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseport.converter.megatron import (
    DistributedTRTLLMModelWeightsConverter,
    Parallel,
    SingleDeviceTRTLLMModelWeightsConverter,
)

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import Case
from fuseport_testing.dropin import one_process, shards
from fuseport_testing.megatron_reference import (
    NEMOTRON_NAS_NAMES,
    DataType,
    ExportConfig,
    Place,
    TRTLLMLayers,
    a_rank,
    distributed_module,
    given_scales,
    nothing_to_sum,
    single_module,
    stand_ins,
    transformer_config,
)
from fuseport_testing.nas import nas_config, nas_model
from fuseport_testing.small_models import (
    NORMS,
    WORDS,
    State,
    assert_same_bits,
    random_state,
    random_tensors,
    small,
)

QUANTS = {"transformer.layers.0.mlp.fc": 13.7, "transformer.layers.0.attention.dense": 0.37}
DENSE = {"linear_bias": True, "query_groups": 2, **NORMS["zero-centred layer"]}
MODELS = {
    "gated": small(**DENSE),
    "plain": small(gated=False, **DENSE),
    "experts": small(experts=2),
    "nas": nas_model()[0],
}


def tensors_of(model: str) -> tuple[State, Any]:
    """Every tensor, and the configuration."""
    case = MODELS[model]
    if model == "nas":
        return nas_model()[1], nas_config(case)
    return random_state(case), transformer_config(case)


def by_target(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in layers by what the target calls them, as the reference does after renaming."""
    for name, value in state.items():
        prefix, _, rest = name.partition(".layers.")
        number, _, part = rest.partition(".")
        if rest:
            layer = NEMOTRON_NAS_NAMES[f"{prefix}.layers.{part}"].value
            yield layer.replace("layers.", f"layers.{number}."), value


def targets(model: str) -> list[tuple[str, torch.Tensor]]:
    """Without Nemotron-NAS, MLPs have the usual name, which the merged dictionary hides."""
    found = list(by_target(tensors_of(model)[0]))
    return found if model == "nas" else [(k.replace(".ffn.", ".mlp."), v) for k, v in found]


LAYERS = [(model, name) for model in MODELS for name, _ in targets(model)]


def test_every_name_of_the_enumeration_is_tried() -> None:
    tried = {".".join(part for part in name.split(".") if not part.isdigit()) for _, name in LAYERS}
    once = {"transformer.vocab_embedding", "transformer.position_embedding", "transformer.ln_f"}
    rest = {one.value for one in TRTLLMLayers if one.value.rpartition(".")[0] not in once}
    assert tried == rest - {"lm_head.weight"}


def single_pair(config: Any, tp: int) -> tuple[Any, Any]:
    """Fuseport's and Megatron's single-device converters."""
    options: dict[str, Any] = {"activation": "gelu", "scales": given_scales(QUANTS)}
    args = (ExportConfig(inference_tp_size=tp), config, DataType.float32)
    with stand_ins(single_module):
        its = single_module.SingleDeviceTRTLLMModelWeightsConverter(*args, **options)
    return SingleDeviceTRTLLMModelWeightsConverter(*args, **options), its


def distributed_pair(config: Any, tp: int = 1, rank: int = 0) -> tuple[Any, Any]:
    """Fuseport's and Megatron's distributed converters."""
    options: dict[str, Any] = {"activation": "gelu", "scales": given_scales(QUANTS)}
    args = (config, DataType.float32)
    with stand_ins(distributed_module), a_rank(Place(tp, 1, rank, 0), nothing_to_sum):
        its = distributed_module.DistributedTRTLLMModelWeightsConverter(*args, **options)
    place = Parallel(tp, rank)
    return DistributedTRTLLMModelWeightsConverter(*args, **options, parallel=place), its


def assert_same_weights(mine: Any, its: Any) -> None:
    assert its.trtllm_model_weights
    assert_same_bits(mine.trtllm_model_weights, its.trtllm_model_weights)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("model", "name"), LAYERS)
def test_a_layers_tensor_of_a_whole_model(model: str, name: str, tp: int) -> None:
    mine, its = single_pair(tensors_of(model)[1], tp)
    for one in (mine, its):
        one._convert_transformer_layer(name, dict(targets(model))[name])
    assert_same_weights(mine, its)


@pytest.mark.parametrize(("model", "name"), [one for one in LAYERS if "expert" not in one[1]])
def test_a_layers_tensor_of_a_shard(model: str, name: str) -> None:
    mine, its = distributed_pair(tensors_of(model)[1])
    with stand_ins(distributed_module):
        for one in (mine, its):
            one._convert_transformer_layer(name, dict(targets(model))[name])
    assert_same_weights(mine, its)


def dense_shard(rank: int) -> dict[str, torch.Tensor]:
    shard = shards(MODELS["gated"], 2)[rank]
    return {key.replace(".ffn.", ".mlp."): value for key, value in by_target(shard)}


@pytest.mark.parametrize("name", dense_shard(0))
def test_a_layers_tensor_of_the_second_rank(name: str) -> None:
    mine, its = distributed_pair(transformer_config(MODELS["gated"]), 2, 1)
    with stand_ins(distributed_module):
        for one in (mine, its):
            one._convert_transformer_layer(name, dense_shard(1)[name])
    assert_same_weights(mine, its)


@pytest.mark.parametrize("pair", [single_pair, distributed_pair])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
def test_a_tensor_outside_layers(pair: Any, shape: tuple[int, ...]) -> None:
    mine, its = pair(transformer_config(small()), 1)
    name, value = "lm_head.weight", random_tensors({"one": shape})["one"]
    left = []
    with stand_ins(distributed_module):
        for one in (mine, its):
            state = {name: value, "transformer.ln_f.weight": value}
            one._convert_non_transformer_layer(state, name)
            one._convert_non_transformer_layer(state, "transformer.ln_f.bias")
            left.append(set(state))
    assert left == [{"transformer.ln_f.weight"}] * 2
    assert_same_weights(mine, its)


@pytest.mark.parametrize("name", ["transformer.layers.0.mlp.fc.weight", "x.y.bias", "x"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
def test_storing_a_tensor(name: str, shape: tuple[int, ...]) -> None:
    mine, its = distributed_pair(transformer_config(small()))
    value = random_tensors({"one": shape})["one"]
    with stand_ins(distributed_module):
        for one in (mine, its):
            one._add_to_trtllm_model_weights(value, name)
            one._add_to_trtllm_model_weights(val=value + 1, layer_name=name)
    assert_same_weights(mine, its)


@pytest.mark.parametrize(("tp", "vocab"), [(1, 12), (1, 9), (2, 16), (2, 10), (2, 4)])
def test_an_embedding_without_padding(tp: int, vocab: int) -> None:
    case: Case = small(vocab=vocab, padded_vocab=16)
    held = shards(case, tp)
    table = random_state(case)[WORDS]
    for rank in range(tp):
        mine, its = distributed_pair(transformer_config(case), tp, rank)
        with one_process(held):
            found = mine._get_remove_vocab_padding(WORDS, held[rank], vocab)
            assert mine._get_remove_vocab_padding("absent", held[rank], vocab) is None

        def summed(tensor: torch.Tensor, group: object) -> None:
            tensor.copy_(table)

        with stand_ins(distributed_module), a_rank(Place(tp, 1, rank, 0), summed):
            expected = its._get_remove_vocab_padding(WORDS, held[rank], vocab)
            assert its._get_remove_vocab_padding("absent", held[rank], vocab) is None
        assert_same_bits({"table": found}, {"table": expected})


@pytest.mark.parametrize("groups", [0, None])
@pytest.mark.parametrize("multi_query", [False, True])
def test_kv_heads_that_the_configuration_does_not_tell(
    groups: int | None, multi_query: bool
) -> None:
    config = SimpleNamespace(**vars(transformer_config(small())) | {"num_query_groups": groups})
    one = SingleDeviceTRTLLMModelWeightsConverter(
        ExportConfig(), config, DataType.float32, multi_query_mode=multi_query
    )
    assert one.num_kv_heads == (1 if multi_query else 4)
