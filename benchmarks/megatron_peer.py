"""Megatron-Core's own converter to TensorRT-LLM's layout, for one rank and in one process.

It runs as it is but for what it takes from TensorRT-LLM (one helper) and from the processes of a
training run (its place). It puts its results into pinned host memory, a buffer for each; for a
comparison of kernels they are put on the GPU instead.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fuseport.converter import ModelSpec

from .models import MODULES

State = dict[str, torch.Tensor]
Convert = Callable[[], State]


def config(whole: ModelSpec) -> types.SimpleNamespace:
    """The fields of a TransformerConfig that the converters read."""
    return types.SimpleNamespace(
        num_layers=whole.num_layers,
        hidden_size=whole.hidden_size,
        ffn_hidden_size=whole.ffn_hidden_size,
        num_attention_heads=whole.num_attention_heads,
        num_query_groups=whole.num_query_groups,
        kv_channels=whole.kv_channels,
        layernorm_zero_centered_gamma=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        virtual_pipeline_model_parallel_size=None,
    )


def scales(
    layers: int, quant_scale: float, device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    """A scale for every linear weight, as the converters take them."""
    values = {"trt_llm_scale": 1 / quant_scale, "weight_multiplier": quant_scale}
    pair = {name: torch.tensor([value], device=device) for name, value in values.items()}
    return {
        f"transformer.layers.{layer}.{module}.weights_scaling_factor": pair
        for layer in range(layers)
        for module in MODULES
    }


@contextmanager
def in_place(tp_size: int, output: torch.device | None) -> Iterator[None]:
    """Megatron's module with what it needs; results go to `output` (None: as it is)."""
    package, utils = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm._utils")
    utils.str_dtype_to_torch = lambda name: getattr(torch, name)  # type: ignore[attr-defined]
    from megatron.core import parallel_state as state
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as module,
    )

    place = {
        "get_tensor_model_parallel_world_size": tp_size,
        "get_tensor_model_parallel_rank": 0,
        "get_pipeline_model_parallel_world_size": 1,
        "get_pipeline_model_parallel_rank": 0,
        "get_tensor_model_parallel_group": None,
    }
    getters: dict[str, Any] = {name: mock.Mock(return_value=v) for name, v in place.items()}
    empty = torch.empty

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if output is not None and kwargs.pop("pin_memory", False):
            kwargs["device"] = output
        return empty(*args, **kwargs)

    with (
        mock.patch.dict(sys.modules, {"tensorrt_llm": package, "tensorrt_llm._utils": utils}),
        mock.patch.multiple(state, **getters),
        mock.patch.object(module, "tqdm", lambda items, **_: items),
        mock.patch.object(module.torch, "empty", allocate),
    ):
        yield


def converter(
    state: State, whole: ModelSpec, tp_size: int, quant_scale: float | None,
    output: torch.device | None,
) -> Convert:  # fmt: skip
    """Converts `state`, one rank's shard; with `quant_scale` its linear weights become e4m3."""
    device = next(iter(state.values())).device
    given = {} if quant_scale is None else scales(whole.num_layers, quant_scale, device)

    def convert() -> State:
        from megatron.core.export.data_type import DataType
        from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
            DEFAULT_CONVERSION_DICT as NAMES,
        )
        from megatron.core.export.trtllm.trtllm_weights_converter import (
            distributed_trtllm_model_weights_converter as module,
        )

        with in_place(tp_size, output):
            made = module.DistributedTRTLLMModelWeightsConverter(
                config(whole), DataType.bfloat16, activation="swiglu", scales=given
            )
            made.convert(dict(state), NAMES, whole.vocab_size)
        weights: State = made.trtllm_model_weights
        return weights

    return convert
