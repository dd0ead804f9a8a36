"""A rank's shard: the drop-in and Megatron-Core's distributed converter make the same bits.

All tensor-parallel ranks run in one process, where each finds the others' rows without a group;
`test_dropin_processes.py` has real ones. What the reference cannot do is compared with a whole
model's conversion, with the oracle's, or worked out by hand in `test_mended.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel
from fuseport.converter.recipe import DTYPES

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.dropin import convert_case, convert_stage, one_process, shards
from fuseport_testing.megatron_reference import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_NAMES,
    reference_distributed,
    shard_of,
    stage_of,
    transformer_config,
)
from fuseport_testing.nas import GROUPS, few_kv_heads, nas_config, nas_model
from fuseport_testing.oracle import oracle_trtllm
from fuseport_testing.small_models import (
    State,
    assert_same_bits,
    experts_apart,
    invented,
    random_state,
    scales_of,
    sharded_models,
    small,
)

NAMES = [DEFAULT_CONVERSION_DICT, {invented(k): v for k, v in DEFAULT_CONVERSION_DICT.items()}]


def check_stage(
    case: Case,
    tp: int = 1,
    pp: int = 1,
    pp_rank: int = 0,
    dtype: str = "float32",
    scales: Mapping[str, float] | None = None,
    own_names: bool = False,
) -> None:
    """Every rank of a stage against the distributed reference."""
    held = shards(case, tp, pp, pp_rank)
    config = transformer_config(case)
    expected = reference_distributed(held, config, pp, pp_rank, dtype, case.vocab, scales=scales)
    if own_names:
        held = [{invented(name): value for name, value in shard.items()} for shard in held]
    kept = [dict(shard) for shard in held]
    stage = {"pp": pp, "pp_rank": pp_rank, "scales": scales, "names": NAMES[own_names]}
    found = convert_stage(held, config, case.vocab, dtype, **stage)
    for rank, (mine, its) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(mine, its)
        assert_same_bits(held[rank], kept[rank])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shards(data: st.DataObject) -> None:
    draw, tp = data.draw, data.draw(st.integers(1, 4))
    case = draw(sharded_models(tp))
    pp = draw(st.integers(1, case.layers))
    dtype, own_names = draw(st.sampled_from(sorted(DTYPES))), draw(st.booleans())
    scales = draw(scales_of(case, -(-case.layers // pp)))
    for pp_rank in range(pp):
        check_stage(case, tp, pp, pp_rank, dtype, scales, own_names)


@pytest.mark.parametrize("vocab", [12, 10, 6])
def test_shards_of_a_padded_vocabulary(vocab: int) -> None:
    check_stage(small(vocab=vocab, padded_vocab=16), tp=2)


def test_shards_with_learned_positions() -> None:
    check_stage(small(rope=False, positions=8), tp=2)


def test_shards_of_a_tied_model_in_stages() -> None:
    check_stage(small(tied=True, layers=2), pp=2, pp_rank=1)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_with_layers_that_are_replaced_or_left_out(tp: int) -> None:
    case, state = nas_model()
    for pp, pp_rank in ((1, 0), (3, 0), (3, 1), (3, 2)):
        held = [nas_shard(stage_of(state, case, pp, pp_rank), case, tp, r) for r in range(tp)]
        stage = {"names": NEMOTRON_NAS_NAMES}
        facts = (nas_config(case), pp, pp_rank, "float32", case.vocab)
        expected = reference_distributed(held, *facts, **stage)
        found = convert_stage(held, nas_config(case), case.vocab, pp=pp, pp_rank=pp_rank, **stage)
        for mine, its in zip(found, expected, strict=True):
            assert_same_bits(mine, its)


@pytest.mark.parametrize("tp", [2, 4])
def test_layers_with_fewer_kv_heads_than_the_configuration_says(tp: int) -> None:
    """And than there are ranks: each gets its query heads' one KV head."""
    case, state, config = few_kv_heads()
    held = [shard_of(state, case, tp, rank) for rank in range(tp)]
    found = convert_stage(held, config, case.vocab)
    for layer, groups in enumerate(GROUPS):
        source = state[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
        per_group = source.unflatten(0, (groups, -1, case.kv_channels))
        queries, keys, values = per_group.tensor_split((-2, -1), 1)
        for rank, tensors in enumerate(found):
            first, count = rank * groups // tp, max(groups // tp, 1)
            pairs = [part[first : first + count].flatten(0, 1) for part in (keys, values)]
            heads = queries.flatten(0, 1).chunk(tp)[rank]
            expected = torch.cat([heads, *pairs]).flatten(0, 1)
            name = f"transformer.layers.{layer}.attention.qkv.weight"
            assert torch.equal(tensors[name], expected)


def nas_shard(state: State, case: Case, tp: int, rank: int) -> State:
    """The linears that stand for a block are column-parallel."""
    linears = {name: value.chunk(tp)[rank] for name, value in state.items() if is_linear(name)}
    return shard_of(state, case, tp, rank) | linears


def is_linear(name: str) -> bool:
    return name.split(".")[3:] in (["self_attention", "weight"], ["mlp", "weight"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_vocabulary_and_any_number_of_kv_heads(data: st.DataObject) -> None:
    """Rows of other ranks are needed: beyond the reference, so against a whole model's ranks."""
    draw, tp = data.draw, data.draw(st.integers(1, 4))
    groups = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    vocab = draw(st.integers(2, 19))
    stored = -(-vocab // tp) * tp + tp * draw(st.integers(0, 2))
    case = small(
        heads=tp * draw(st.integers(1, 2)),
        query_groups=groups,
        vocab=vocab,
        padded_vocab=stored,
        layers=2,
        qkv_bias=draw(st.booleans()),
    )
    pp, dtype = draw(st.integers(1, 2)), draw(st.sampled_from(sorted(DTYPES)))
    expected = whole(case, tp, pp, dtype)
    for pp_rank in range(pp):
        found = convert_case(case, tp, pp, pp_rank, dtype=dtype)
        for rank, mine in enumerate(found):
            assert_same_bits(mine, expected[pp_rank * tp + rank])


def whole(case: Case, tp: int, pp: int, dtype: str) -> list[State]:
    """From the whole model, with embeddings split as the distributed converter splits them."""
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)), model_type="llama")
    recipe = Recipe(tp_size=tp, pp_size=pp, dtype=dtype, use_parallel_embedding=True)
    return convert_state_dict(random_state(case), spec, recipe)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("tp", "ep", "pp"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 4, 1)]
)
def test_shards_of_experts(tp: int, ep: int, pp: int, apart: bool) -> None:
    case = small(experts=4, layers=3, moe_layers=(0, 1, 1), moe_ffn=8)
    state, dtype = experts_apart(random_state(case)), torch.bfloat16
    expected = oracle_trtllm(state, case, tp, pp, dtype, case.vocab, True, moe_ep=ep)
    config = transformer_config(case)
    for pp_rank in range(pp):
        held = shards(case, tp, pp, pp_rank, ep)
        held = [experts_apart(shard) for shard in held] if apart else held
        found = convert_stage(held, config, case.vocab, "bfloat16", pp=pp, pp_rank=pp_rank, ep=ep)
        for rank, mine in enumerate(found):
            assert_same_bits(mine, expected[pp_rank * tp + rank])


def converter(case: Case, rank: int = 0, tp: int = 1, **options: Any) -> Any:
    return DistributedTRTLLMModelWeightsConverter(
        transformer_config(case), "float32", parallel=Parallel(tp, rank), **options
    )


@pytest.mark.parametrize("output", ["host", "cuda"])
def test_new_values_in_the_same_tensors(output: str) -> None:
    """The plan is kept; where rows come from other ranks, they are fetched again."""
    case = small(vocab=9, padded_vocab=12)
    held = shards(case, 2)
    with one_process(held):
        one = converter(case, 1, 2, output=output)
        one.convert(held[1], DEFAULT_CONVERSION_DICT, 9)
        for tensor in (tensor for shard in held for tensor in shard.values()):
            tensor.neg_()
        one.convert(held[1], DEFAULT_CONVERSION_DICT, 9)
    expected = convert_stage(held, transformer_config(case), 9)[1]
    assert_same_bits(one.trtllm_model_weights, expected)


@pytest.mark.parametrize("output", ["host", "cuda"])
def test_new_tensors_for_the_same_converter(output: str) -> None:
    case = small()
    one = converter(case, output=output)
    for seed, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32)):
        state = {name: value.to(dtype) for name, value in random_state(case, seed).items()}
        one.convert(state, DEFAULT_CONVERSION_DICT, 12)
        expected = reference_distributed([state], transformer_config(case), 1, 0, "float32", 12)
        assert_same_bits(one.trtllm_model_weights, expected[0])


def test_the_same_memory_read_as_another_dtype() -> None:
    case = small()
    one, state = converter(case), {k: v.bfloat16() for k, v in random_state(case).items()}
    one.convert(state, DEFAULT_CONVERSION_DICT, 12)
    halves = {name: value.view(torch.float16) for name, value in state.items()}
    one.convert(halves, DEFAULT_CONVERSION_DICT, 12)
    expected = convert_stage([halves], transformer_config(case), 12)[0]
    assert_same_bits(one.trtllm_model_weights, expected)


@pytest.mark.parametrize("output", ["host", "cuda"])
def test_the_same_tensors_under_nemotron_nas_names(output: str) -> None:
    """Names of the earlier plan are gone, for their bytes are overwritten."""
    case = small()
    one, state = converter(case, output=output), random_state(case)
    one.convert(state, DEFAULT_CONVERSION_DICT, 12)
    one.convert(state, NEMOTRON_NAS_NAMES, 12)
    expected = reference_distributed(
        [state], transformer_config(case), 1, 0, "float32", 12, names=NEMOTRON_NAS_NAMES
    )
    assert_same_bits(one.trtllm_model_weights, expected[0])


def test_a_new_plan_keeps_what_was_added_one_by_one() -> None:
    case, state = small(), random_state(small())
    one, extra = converter(case), torch.arange(6.0).view(2, 3)
    name = "transformer.layers.0.mlp.fc.weight"
    one._add_to_trtllm_model_weights(extra, "before.weight")
    one.convert(state, DEFAULT_CONVERSION_DICT, 12)
    one._add_to_trtllm_model_weights(extra, "after.weight")
    one._add_to_trtllm_model_weights(extra, name)
    one.convert(dict(state), NEMOTRON_NAS_NAMES, 12)
    added = {"before.weight", "after.weight", name}
    expected = convert_stage([state], transformer_config(case), 12, names=NEMOTRON_NAS_NAMES)[0]
    assert_same_bits(one.trtllm_model_weights, expected | dict.fromkeys(added, extra.T))


@pytest.mark.parametrize("tp", [1, 2])
def test_consume_empties_the_dict_and_changes_nothing_else(tp: int) -> None:
    case = small(vocab=9, padded_vocab=12)
    held = shards(case, tp)
    expected = convert_stage(held, transformer_config(case), 9)
    with one_process(held):
        for rank, shard in enumerate(held):
            one, given_up = converter(case, rank, tp, consume=True), dict(shard)
            one.convert(given_up, DEFAULT_CONVERSION_DICT, 9)
            assert not given_up
            assert_same_bits(one.trtllm_model_weights, expected[rank])
            # And again, from nothing that is kept.
            one.convert(dict(shard), DEFAULT_CONVERSION_DICT, 9)
            assert_same_bits(one.trtllm_model_weights, expected[rank])


def test_results_own_their_memory() -> None:
    """Not views of what the caller goes on to train."""
    case, state = small(), random_state(small())
    for output in ("host", "cuda"):
        one = converter(case, output=output)
        one.convert(state, DEFAULT_CONVERSION_DICT, 12)
        sources = {value.untyped_storage().data_ptr() for value in state.values()}
        for tensor in one.trtllm_model_weights.values():
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().data_ptr() not in sources


def test_scales_with_tied_and_padded_shards() -> None:
    case = small(layers=2, tied=True, padded_vocab=16)
    scales = {"transformer.layers.0.attention.qkv": 13.7, "transformer.layers.0.mlp.gate": 0.37}
    for pp_rank in range(2):
        check_stage(case, 2, 2, pp_rank, "bfloat16", scales)
