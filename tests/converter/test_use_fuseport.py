"""An unchanged script of `TRTLLMHelper` converts through fuseport, and gives the same weights."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuseport.converter import megatron
from fuseport.converter.use_fuseport import REPLACED, use_fuseport

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import Case
from fuseport_testing.dropin import one_process, shards
from fuseport_testing.megatron_reference import (
    DataType,
    ExportConfig,
    Place,
    a_rank,
    distributed_module,
    single_module,
    stacked,
    transformer_config,
)
from fuseport_testing.small_models import (
    OUTPUT,
    WORDS,
    State,
    assert_same_bits,
    random_state,
    small,
)
from fuseport_testing.trtllm_helper import helper_module, model_type, trtllm, with_scales

HELD_BY = {
    "DistributedTRTLLMModelWeightsConverter": (distributed_module, helper_module),
    "SingleDeviceTRTLLMModelWeightsConverter": (single_module, helper_module),
}


def helper(case: Case) -> Any:
    return helper_module.TRTLLMHelper(
        transformer_config=transformer_config(case),
        model_type=model_type.llama,
        activation="swiglu",
        max_position_embeddings=case.positions,
        share_embeddings_and_output_weights=case.tied,
    )


def is_linear(name: str) -> bool:
    return ".linear_" in name and name.rpartition(".")[2] == "weight"


def on_one_device(case: Case, state: dict[str, Any], fp8: bool, split: bool) -> list[State]:
    """What such a script does."""
    weights, configs = helper(case).get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=state,
        dtype=DataType.bfloat16,
        export_config=ExportConfig(inference_tp_size=2, inference_pp_size=2),
        state_dict_split_by_layer_numbers=split,
        fp8_quantized=fp8,
        fp8_kvcache=fp8,
    )
    assert [config.mapping.tp_rank for config in configs] == [0, 1, 0, 1]
    assert {config.vocab_size for config in configs} == {case.vocab}
    found: list[State] = weights
    return found


def on_all_devices(case: Case, state: dict[str, Any], fp8: bool) -> list[State]:
    """The same on each rank of a distributed run."""
    weights, configs = helper(case).get_trtllm_pretrained_config_and_model_weights(
        model_state_dict=state,
        dtype=DataType.bfloat16,
        on_device_distributed_conversion=True,
        vocab_size=case.vocab,
        gpus_per_node=8,
        fp8_quantized=fp8,
    )
    assert configs[0].vocab_size == case.vocab
    found: list[State] = weights
    return found


def assert_unchanged_by_fuseport(script: Callable[[], list[State]]) -> None:
    """Run with and without; every file must have the same bits."""
    with trtllm():
        expected = script()
        with use_fuseport():
            found = script()
    for mine, its in zip(found, expected, strict=True):
        assert_same_bits(mine, its)


@pytest.mark.parametrize(("fp8", "split"), [(False, True), (False, False), (True, True)])
def test_a_script_for_one_device(fp8: bool, split: bool) -> None:
    case = small(layers=2, query_groups=2)
    whole = random_state(case) if split else stacked(random_state(case), case.layers)
    state = with_scales(whole, is_linear) if fp8 else whole
    assert_unchanged_by_fuseport(lambda: on_one_device(case, dict(state), fp8, split))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_script_for_each_device(fp8: bool, rank: int) -> None:
    case = small(vocab=12, padded_vocab=16)
    held, table = shards(case, 2), random_state(case)
    state = with_scales(held[rank], is_linear) if fp8 else held[rank]

    def script() -> list[State]:
        # The reference sums the word embedding first, then the output layer.
        sums = iter((table[WORDS], table[OUTPUT]))

        def summed(tensor: torch.Tensor, group: object) -> None:
            tensor.copy_(next(sums))

        with a_rank(Place(2, 1, rank, 0), summed), one_process(held):
            return on_all_devices(case, dict(state), fp8)

    assert_unchanged_by_fuseport(script)


def converter_of_a_script(case: Case) -> type:
    with trtllm():
        one = helper(case)
        one.get_trtllm_pretrained_config_and_model_weights(
            random_state(case), DataType.float32, ExportConfig()
        )
    return type(one.weights_converter)


def test_the_helper_uses_our_classes_within_the_block_only() -> None:
    with use_fuseport():
        within = converter_of_a_script(small())
    assert within is megatron.SingleDeviceTRTLLMModelWeightsConverter
    after = converter_of_a_script(small())
    assert after is single_module.SingleDeviceTRTLLMModelWeightsConverter


def test_megatrons_classes_are_back_after_the_block() -> None:
    before = {(m, n): getattr(m, n) for n, modules in HELD_BY.items() for m in modules}

    def script() -> None:
        with use_fuseport():
            for module, name in before:
                assert getattr(module, name) is REPLACED[name]
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        script()
    for (module, name), original in before.items():
        assert getattr(module, name) is original
        assert original is not REPLACED[name]


def test_blocks_within_blocks() -> None:
    name = "SingleDeviceTRTLLMModelWeightsConverter"
    original = getattr(helper_module, name)
    with use_fuseport():
        with use_fuseport():
            assert getattr(helper_module, name) is REPLACED[name]
        assert getattr(helper_module, name) is REPLACED[name]
    assert getattr(helper_module, name) is original


def test_without_megatron_it_says_so() -> None:
    program = (
        "import sys\n"
        "sys.modules['megatron'] = None\n"
        "from fuseport.converter.use_fuseport import use_fuseport\n"
        "try:\n"
        "    with use_fuseport(): pass\n"
        "except ImportError as error:\n"
        "    print('megatron' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
