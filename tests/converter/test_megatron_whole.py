"""Whole models: fuseport and Megatron-Core's single-device converter make the same bits.

`convert_state_dict` gives each rank's tensors; the drop-in also keeps the reference's dictionary,
under the same keys. What the reference gets wrong has its tests in `test_mended.py`, and the
property tests keep away from it.
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
from fuseport.converter.blocks import Block
from fuseport.converter.megatron import SingleDeviceTRTLLMModelWeightsConverter
from fuseport.converter.recipe import DTYPES
from fuseport.kernels.move import GivenScale

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.megatron_reference import (
    DEFAULT_CONVERSION_DICT,
    NEMOTRON_NAS_NAMES,
    DataType,
    ExportConfig,
    given_scales,
    reference_single,
    run_single,
    single_module,
    split_over_ranks,
    stacked,
    stand_ins,
    transformer_config,
)
from fuseport_testing.nas import NAS_KINDS, nas_config, nas_model
from fuseport_testing.small_models import (
    State,
    assert_same_bits,
    invented,
    random_state,
    scales_of,
    small,
    whole_models,
    without_routers,
)
from fuseport_testing.spellings import with_te_norms

HEAD = "lm_head.weight"
OWN_NAMES = {invented(name): layer for name, layer in DEFAULT_CONVERSION_DICT.items()}


def drop_in(
    config: Any,
    tp: int,
    pp: int,
    dtype: str = "float32",
    parallel_embedding: bool = False,
    activation: str = "gelu",
    scales: Mapping[str, float] | None = None,
) -> SingleDeviceTRTLLMModelWeightsConverter:
    """Fuseport's converter, made with Megatron's own classes."""
    export = ExportConfig(
        inference_tp_size=tp, inference_pp_size=pp, use_parallel_embedding=parallel_embedding
    )
    return SingleDeviceTRTLLMModelWeightsConverter(
        export, config, DataType[dtype], activation=activation, scales=given_scales(scales)
    )


def assert_same_converters(mine: Any, its: Any, tp: int, pp: int, falcon: bool = False) -> None:
    """The same dictionary, the same padded vocabulary and the same tensors for every rank."""

    def compared(tensors: State, dtype: torch.dtype) -> State:
        return without_routers(tensors, dtype)

    assert_same_bits(
        compared(mine.trtllm_model_weights, torch.float32),
        compared(its.trtllm_model_weights, its.storage_type),
    )
    with stand_ins(single_module):
        assert mine.get_padded_vocab_size() == its.get_padded_vocab_size()
    both = (split_over_ranks(one, tp, pp, falcon) for one in (mine, its))
    for index, (rank, expected) in enumerate(zip(*both, strict=True)):
        if HEAD not in mine.trtllm_model_weights and index >= tp:
            # Mended: a tied head of a stage that has no embedding.
            rank.pop(HEAD, None)
        assert_same_bits(compared(rank, torch.float32), compared(expected, its.storage_type))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whole_models(data: st.DataObject) -> None:
    draw, tp = data.draw, data.draw(st.integers(1, 4))
    case = draw(whole_models(tp))
    pp = draw(st.integers(1, case.layers))
    dtype, parallel = draw(st.sampled_from(sorted(DTYPES))), draw(st.booleans())
    scales = draw(scales_of(case, case.layers))
    falcon = draw(st.booleans())
    state = with_te_norms(random_state(case)) if draw(st.booleans()) else random_state(case)
    one_tensor = case.moe_layers is None and draw(st.booleans())
    theirs = stacked(state, case.layers) if one_tensor else dict(state)
    names = DEFAULT_CONVERSION_DICT
    if draw(st.booleans()):
        theirs = {invented(name): value for name, value in theirs.items()}
        names = OWN_NAMES
    options: dict[str, Any] = {"parallel_embedding": parallel, "scales": scales}
    options["activation"] = "swiglu" if case.gated else "gelu"
    mine = drop_in(transformer_config(case), tp, pp, dtype, **options)
    kept = dict(theirs)
    mine.convert(theirs, names, not one_tensor)
    assert_same_bits(theirs, kept)
    its = run_single(
        theirs,
        transformer_config(case),
        tp,
        pp,
        dtype,
        names=names,
        split_by_layer=not one_tensor,
        **options,
    )
    assert_same_converters(mine, its, tp, pp, falcon)
    recipe = Recipe(tp_size=tp, pp_size=pp, dtype=dtype, use_parallel_embedding=parallel)
    ranks = from_state_dict(case, recipe, state, scales, "falcon" if falcon else "llama")
    expected = split_over_ranks(its, tp, pp, falcon)
    for rank, (found, of_theirs) in enumerate(zip(ranks, expected, strict=True)):
        if case.tied and rank >= tp:
            found.pop(HEAD, None)
        assert_same_bits(
            without_routers(found, torch.float32), without_routers(of_theirs, DTYPES[dtype])
        )


def from_state_dict(
    case: Case, recipe: Recipe, state: State, scales: Mapping[str, float], model_type: str
) -> list[State]:
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)), model_type=model_type)
    given = {module: GivenScale(value) for module, value in scales.items()}
    return convert_state_dict(state, spec, recipe, scales=given)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 3)])
def test_layers_that_are_replaced_or_left_out(tp: int, pp: int) -> None:
    case, state = nas_model()
    config = nas_config(case)
    its = run_single(dict(state), config, tp, pp, "float32", names=NEMOTRON_NAS_NAMES)
    mine = drop_in(config, tp, pp)
    mine.convert(state, NEMOTRON_NAS_NAMES)
    assert_same_converters(mine, its, tp, pp)
    blocks = tuple(Block(attention, 4, mlp, 256) for attention, mlp in NAS_KINDS)
    facts = vars(megatron_args(case, 1, 1))
    spec = ModelSpec.from_facts(facts, model_type="nemotron_nas").replace(blocks=blocks)
    found = convert_state_dict(state, spec, Recipe(tp_size=tp, pp_size=pp, dtype="float32"))
    for rank, expected in zip(found, split_over_ranks(its, tp, pp), strict=True):
        assert_same_bits(rank, expected)


def test_scales_of_a_later_stage() -> None:
    case, scales = small(layers=2), {"transformer.layers.1.mlp.fc": 2.0}
    state = random_state(case)
    expected = reference_single(state, transformer_config(case), 1, 2, "float32", scales=scales)
    found = from_state_dict(case, Recipe(pp_size=2, dtype="float32"), state, scales, "llama")
    assert found[1]["transformer.layers.0.mlp.fc.weight"].dtype is torch.float8_e4m3fn
    for mine, its in zip(found, expected, strict=True):
        assert_same_bits(mine, its)


def test_a_second_conversion_gives_the_new_values() -> None:
    case = small(layers=2)
    converter, state = drop_in(transformer_config(case), 2, 1), random_state(case)
    converter.convert(state, DEFAULT_CONVERSION_DICT)
    for tensor in state.values():
        tensor.neg_()
    converter.convert(state, DEFAULT_CONVERSION_DICT)
    expected = run_single(dict(state), transformer_config(case), 2, 1, "float32")
    assert_same_bits(converter.trtllm_model_weights, expected.trtllm_model_weights)
