"""Names and shapes for a tiny GPT, as Megatron-Core's own unit tests of these classes expect them.

Two layers of four heads of 16, split for two ranks.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from fuseport.converter.megatron import (
    DistributedTRTLLMModelWeightsConverter,
    Parallel,
    SingleDeviceTRTLLMModelWeightsConverter,
)

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.dropin import shards
from fuseport_testing.megatron_reference import (
    DEFAULT_CONVERSION_DICT,
    DataType,
    ExportConfig,
    Place,
    stacked,
    transformer_config,
)
from fuseport_testing.small_models import NORMS, State, random_state, small

Shapes = dict[str, tuple[int, ...]]
VOCAB, POSITIONS, HIDDEN, HEADS, FFN = 256, 64, 64, 4, 256
GPT = small(
    hidden=HIDDEN,
    heads=HEADS,
    query_groups=HEADS,
    kv_channels=HIDDEN // HEADS,
    ffn=FFN,
    layers=2,
    vocab=VOCAB,
    positions=POSITIONS,
    rope=False,
    gated=False,
    linear_bias=True,
    **NORMS["layer"],
)
ENDS: Shapes = {
    "transformer.vocab_embedding.weight": (256, 64),
    "transformer.position_embedding.weight": (64, 64),
    "lm_head.weight": (256, 64),
    "transformer.ln_f.weight": (64,),
    "transformer.ln_f.bias": (64,),
}
# What all ranks have alike, and what is split for two of them.
WHOLE: Shapes = {
    "input_layernorm.weight": (64,),
    "input_layernorm.bias": (64,),
    "attention.dense.bias": (64,),
    "post_layernorm.weight": (64,),
    "post_layernorm.bias": (64,),
    "mlp.proj.bias": (64,),
}
SPLIT: Shapes = {
    "attention.qkv.weight": (96, 64),
    "attention.qkv.bias": (96,),
    "attention.dense.weight": (64, 32),
    "mlp.fc.weight": (128, 64),
    "mlp.fc.bias": (128,),
    "mlp.proj.weight": (64, 128),
}


def shapes(weights: State) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def converted(split_by_layer: bool = True) -> SingleDeviceTRTLLMModelWeightsConverter:
    state = random_state(GPT)
    converter = SingleDeviceTRTLLMModelWeightsConverter(
        export_config=ExportConfig(inference_tp_size=2),
        transformer_config=transformer_config(GPT),
        dtype=DataType.bfloat16,
    )
    converter.convert(
        model_state_dict=state if split_by_layer else stacked(state, GPT.layers),
        trtllm_conversion_dict=DEFAULT_CONVERSION_DICT,
        state_dict_split_by_layer_numbers=split_by_layer,
    )
    return converter


@pytest.mark.parametrize("split_by_layer", [True, False])
def test_the_dictionary_of_a_whole_model(split_by_layer: bool) -> None:
    expected = dict(ENDS)
    for layer in ("transformer.layers.0.", "transformer.layers.1."):
        expected |= {layer + name: shape for name, shape in WHOLE.items()}
        for rank in range(2):
            expected |= {f"{layer}{name}.{rank}.bin": shape for name, shape in SPLIT.items()}
    found = converted(split_by_layer).trtllm_model_weights
    assert shapes(found) == expected
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_the_padded_vocabulary() -> None:
    assert converted().get_padded_vocab_size() == 256


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_file(rank: int) -> None:
    config = SimpleNamespace(new_decoder_architecture=False)
    found = converted().get_local_model_weights_per_gpu(Place(2, 1, rank, 0), config)
    layers = ("transformer.layers.0.", "transformer.layers.1.")
    expected = {layer + name: shape for layer in layers for name, shape in (WHOLE | SPLIT).items()}
    assert shapes(found) == expected | ENDS | {"lm_head.weight": (128, 64)}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_shard(rank: int) -> None:
    """The distributed converter gives no numbered files, and every embedding is split."""
    converter = DistributedTRTLLMModelWeightsConverter(
        transformer_config=transformer_config(GPT),
        dtype=DataType.bfloat16,
        parallel=Parallel(2, rank),
    )
    converter.convert(
        model_state_dict=shards(GPT, 2)[rank],
        trtllm_conversion_dict=DEFAULT_CONVERSION_DICT,
        tokenizer_vocab_size=VOCAB,
    )
    layers = ("transformer.layers.0.", "transformer.layers.1.")
    expected = {layer + name: shape for layer in layers for name, shape in (WHOLE | SPLIT).items()}
    halves: Shapes = {
        "transformer.vocab_embedding.weight": (128, 64),
        "transformer.position_embedding.weight": (32, 64),
        "lm_head.weight": (128, 64),
    }
    assert shapes(converter.trtllm_model_weights) == expected | ENDS | halves
