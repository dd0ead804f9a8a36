"""Where Megatron-Core's own two converters are wrong, and what fuseport does instead.

Each test shows the reference's fault and then fuseport's answer, worked out by hand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.errors import UnknownTensorError
from fuseport.converter.megatron import SingleDeviceTRTLLMModelWeightsConverter
from fuseport.kernels.move import GivenScale

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.dropin import convert_case, convert_stage, shards
from fuseport_testing.megatron_reference import (
    DEFAULT_CONVERSION_DICT,
    ExportConfig,
    given_scales,
    reference_distributed,
    reference_single,
    run_single,
    split_over_ranks,
    transformer_config,
)
from fuseport_testing.small_models import (
    LAYER,
    NORMS,
    TARGET,
    WORDS,
    State,
    assert_same_bits,
    experts_apart,
    mlp_shapes,
    random_state,
    small,
)

HEAD = "lm_head.weight"
EXPERTS = LAYER + "mlp.experts.experts.linear_fc1.weight"


def theirs(
    case: Case, tp: int = 1, pp: int = 1, state: State | None = None, **options: Any
) -> list[State]:
    """The single-device reference; fp32 unless `options` say otherwise."""
    options = {"dtype": "float32", "activation": "swiglu" if case.gated else "gelu"} | options
    state = random_state(case) if state is None else state
    return reference_single(state, transformer_config(case), tp, pp, **options)


def ours(
    case: Case,
    recipe: Recipe,
    state: State | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[State]:
    """The same through fuseport."""
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)), model_type="llama")
    by_module = {module: GivenScale(value) for module, value in (scales or {}).items()}
    state = random_state(case) if state is None else state
    return convert_state_dict(state, spec, recipe, scales=by_module)


def single(
    case: Case,
    tp: int = 1,
    state: State | None = None,
    pp: int = 1,
    scales: Mapping[str, float] | None = None,
) -> list[State]:
    """And through the drop-in for the single-device converter."""
    converter = SingleDeviceTRTLLMModelWeightsConverter(
        ExportConfig(inference_tp_size=tp, inference_pp_size=pp),
        transformer_config(case),
        "float32",
        scales=given_scales(scales),
    )
    converter.convert(random_state(case) if state is None else state, DEFAULT_CONVERSION_DICT)
    return split_over_ranks(converter, tp, pp)


def fp32(tp: int = 1, pp: int = 1) -> Recipe:
    return Recipe(tp_size=tp, pp_size=pp, dtype="float32")


def shards_of_theirs(case: Case, tp: int) -> list[State]:
    """The distributed reference, in fp32 and in one stage."""
    config = transformer_config(case)
    return reference_distributed(shards(case, tp), config, 1, 0, "float32", case.vocab)


def test_mended_fp8_saturation() -> None:
    case, name = small(), TARGET + "mlp.proj.weight"
    scales = {TARGET + "mlp.proj": 1000.0}
    weight = random_state(case)[LAYER + "mlp.linear_fc2.weight"]
    assert (weight.abs() > 0.448).any()
    # Megatron leaves it to torch, which gives NaN before 2.12 and saturates from then on.
    torch_gives_nan = bool(torch.tensor(1e3).to(torch.float8_e4m3fn).isnan())
    assert bool(theirs(case, scales=scales)[0][name].isnan().any()) is torch_gives_nan
    expected = (weight * 1000.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    for found in (ours(case, fp32(), scales=scales), convert_case(case, 1, scales=scales)):
        assert_same_bits({name: found[0][name]}, {name: expected})


def test_mended_zero_centred_rms_norm() -> None:
    case = small(zero_centered=True)
    gamma = random_state(case)[LAYER + "input_layernorm.weight"]
    name = TARGET + "input_layernorm.weight"
    assert torch.equal(theirs(case)[0][name], gamma)
    for found in (ours(case, fp32()), single(case), convert_case(case, 1)):
        assert torch.equal(found[0][name], gamma + 1)


def test_mended_rounding_of_a_zero_centred_norm() -> None:
    """Not on the way through bf16: fp16 and fp32 hold more of the sum than bf16 does."""
    case = small(**NORMS["zero-centred layer"])
    state = {name: value.bfloat16() for name, value in random_state(case).items()}
    gamma, name = state[LAYER + "input_layernorm.weight"], TARGET + "input_layernorm.weight"
    assert torch.equal(theirs(case, state=state)[0][name], (gamma + 1).float())
    assert not torch.equal(theirs(case, state=state)[0][name], gamma.float() + 1)
    assert torch.equal(ours(case, fp32(), state)[0][name], gamma.float() + 1)


def test_mended_sharded_experts() -> None:
    case = small(experts=2)
    with pytest.raises(ValueError, match="expert cannot be handled by GPU converter"):
        shards_of_theirs(case, 2)
    gate, up = random_state(case)[EXPERTS].chunk(2, 1)
    for rank, found in enumerate(convert_case(case, 2)):
        expected = torch.cat([up.chunk(2, 1)[rank], gate.chunk(2, 1)[rank]], 1)
        assert torch.equal(found[TARGET + "mlp.fc.weight"], expected)


def test_mended_experts_kept_apart() -> None:
    """As Megatron-Core itself has them in memory."""
    case = small(experts=2)
    whole, state = random_state(case), experts_apart(random_state(case))
    with pytest.raises(ValueError, match="Unable to rename key"):
        theirs(case, state=state)
    assert_same_bits(ours(case, fp32(), state)[0], ours(case, fp32(), whole)[0])
    assert_same_bits(single(case, state=state)[0], theirs(case)[0])


def test_mended_experts_without_gate() -> None:
    """The reference exchanges halves that are none: an expert's rows no longer fit its columns."""
    case, name = small(experts=2, gated=False), TARGET + "mlp.fc.weight"
    first = random_state(case)[EXPERTS]
    assert torch.equal(theirs(case)[0][name], first.roll(6, 1))
    assert torch.equal(ours(case, fp32())[0][name], first)


def test_mended_router_in_fp32() -> None:
    case, name = small(experts=2), TARGET + "mlp.router.weight"
    router = random_state(case)[LAYER + "mlp.router.weight"]
    assert torch.equal(theirs(case, dtype="bfloat16")[0][name], router.bfloat16())
    assert torch.equal(ours(case, Recipe())[0][name], router)


def test_mended_dense_and_experts_in_one_layer() -> None:
    case = small(experts=2)
    both = {LAYER + name: torch.ones(shape) for name, shape in mlp_shapes(case).items()}
    merged = theirs(case, state=both | random_state(case))[0][TARGET + "mlp.fc.weight"]
    assert torch.equal(merged, theirs(case)[0][TARGET + "mlp.fc.weight"])
    with pytest.raises(UnknownTensorError, match=r"layers\.0\.mlp\.linear_fc1\.weight"):
        ours(case, fp32(), both | random_state(case))


def test_mended_more_ranks_than_kv_heads() -> None:
    case = small(query_groups=2)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        shards_of_theirs(case, 4)
    q0, q1, k, v = random_state(case)[LAYER + "self_attention.linear_qkv.weight"][16:].chunk(4)
    for found in (ours(case, fp32(tp=4)), convert_case(case, 4)):
        for rank, query in ((2, q0), (3, q1)):
            qkv = torch.cat([query, k, v])
            assert torch.equal(found[rank][TARGET + "attention.qkv.weight"], qkv)


def test_mended_vocabulary_that_ranks_do_not_divide() -> None:
    case = small(vocab=10)
    assert [len(rank[HEAD]) for rank in theirs(case, tp=4)] == [3, 3, 3, 1]
    with pytest.raises(IndexError):
        theirs(small(vocab=9), tp=4)
    padded = torch.cat([random_state(case)["output_layer.weight"], torch.zeros(2, 10)])
    for ranks in (ours(case, fp32(tp=4)), single(case, 4)):
        assert torch.equal(torch.cat([rank[HEAD] for rank in ranks]), padded)


def test_mended_vocabulary_that_shards_do_not_divide() -> None:
    case = small(vocab=10, padded_vocab=12)
    with pytest.raises(AssertionError, match="10 is not divisible by 4"):
        shards_of_theirs(case, 4)
    padded = torch.cat([random_state(case)["output_layer.weight"][:10], torch.zeros(2, 10)])
    assert torch.equal(torch.cat([rank[HEAD] for rank in convert_case(case, 4)]), padded)


def test_mended_tied_head_of_a_later_stage() -> None:
    """Its stage has no embedding to take it from."""
    case = small(tied=True, layers=2, vocab=11)
    assert HEAD not in theirs(case, tp=2, pp=2)[2]
    padded = torch.cat([random_state(case)[WORDS], torch.zeros(1, 10)])
    for ranks in (ours(case, fp32(2, 2)), single(case, 2, pp=2)):
        assert not any(HEAD in rank for rank in ranks[:2])
        assert torch.equal(torch.cat([rank[HEAD] for rank in ranks[2:]]), padded)


def test_mended_scaled_head_of_a_tied_later_stage() -> None:
    case, scales = small(tied=True, layers=2), {"lm_head": 13.7}
    expected = (random_state(case)[WORDS] * 13.7).to(torch.float8_e4m3fn)
    for ranks in (ours(case, fp32(1, 2), scales=scales), single(case, pp=2, scales=scales)):
        assert_same_bits({HEAD: ranks[1][HEAD]}, {HEAD: expected})


def test_mended_bias_of_heads_that_ranks_do_not_divide() -> None:
    """The reference divides a head's size by tp before it multiplies by tp."""
    case = small(kv_channels=6, qkv_bias=True)
    with pytest.raises(RuntimeError, match=r"shape '\[1, 3, 4\]' is invalid for input of size 18"):
        shards_of_theirs(case, 4)
    # A rank has one head of each kind, whose order stays.
    bias = shards(case, 4)[3][LAYER + "self_attention.linear_qkv.bias"]
    assert torch.equal(convert_case(case, 4)[3][TARGET + "attention.qkv.bias"], bias)


def test_mended_unset_query_groups() -> None:
    case, state = small(), random_state(small())
    unset = SimpleNamespace(**vars(transformer_config(case)) | {"num_query_groups": None})
    with pytest.raises(TypeError, match="NoneType"):
        reference_single(state, unset, 1, 1, "float32")
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)) | {"num_query_groups": None})
    assert_same_bits(convert_state_dict(state, spec, fp32())[0], theirs(case)[0])
    assert_same_bits(convert_stage([state], unset, case.vocab)[0], shards_of_theirs(case, 1)[0])


def test_mended_callers_dict() -> None:
    case = small()
    emptied, kept = random_state(case), random_state(case)
    run_single(emptied, transformer_config(case), 1, 1, "float32")
    assert not set(emptied) & set(kept)
    ours(case, fp32(), kept)
    assert_same_bits(kept, random_state(case))


def test_mended_rank_eleven() -> None:
    """Its tensors end in what those of rank 1 end in, and go there too."""
    case = small(heads=12, query_groups=12)
    assert TARGET + "mlp.proj.weight.11.bin" in theirs(case, tp=12)[1]
    column = random_state(case)[LAYER + "mlp.linear_fc2.weight"][:, 1:2]
    for found in (ours(case, fp32(tp=12)), single(case, 12)):
        assert not any(".bin" in name for name in found[1])
        assert torch.equal(found[1][TARGET + "mlp.proj.weight"], column)
