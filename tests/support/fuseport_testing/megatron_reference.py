"""Drives Megatron-Core's own two converters to TensorRT-LLM on the CPU, faults included.

Both need a few things that are missing here: two helpers of `tensorrt_llm`, tqdm, pinned memory,
the parallel state and, over several ranks, a sum. Each gets a stand-in while a converter runs, and
none stays behind: other modules of Megatron-Core look for `tensorrt_llm` when they are imported.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .cases import Case

__all__ = [
    "DEFAULT_CONVERSION_DICT",
    "NEMOTRON_NAS_NAMES",
    "DataType",
    "ExportConfig",
    "Place",
    "TRTLLMLayers",
    "a_rank",
    "distributed_module",
    "given_scales",
    "nothing_to_sum",
    "reference_distributed",
    "reference_single",
    "run_single",
    "shard_of",
    "single_module",
    "split_over_ranks",
    "stacked",
    "stage_of",
    "stand_ins",
    "transformer_config",
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.export.data_type import DataType
    from megatron.core.export.export_config import ExportConfig
    from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
        DEFAULT_CONVERSION_DICT,
        NEMOTRON_NAS_CONVERSION_DICT,
    )
    from megatron.core.export.trtllm.trtllm_layers import TRTLLMLayers
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as distributed_module,
    )
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        single_device_trtllm_model_weights_converter as single_module,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

NEMOTRON_NAS_NAMES = DEFAULT_CONVERSION_DICT | NEMOTRON_NAS_CONVERSION_DICT

State = dict[str, torch.Tensor]

# TransformerConfig's fields that a converter or its own checks read → `Case`'s.
_FIELDS = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "query_groups",
    "kv_channels": "kv_channels",
    "ffn_hidden_size": "ffn",
    "normalization": "normalization",
    "layernorm_zero_centered_gamma": "zero_centered",
    "gated_linear_unit": "gated",
    "add_bias_linear": "linear_bias",
    "add_qkv_bias": "qkv_bias",
}
# What ranks share: end of the name → the axis that is cut. A gated fc1 is cut half by half.
_CUTS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "experts.linear_fc1.weight": 1,
    "experts.linear_fc2.weight": 2,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}


def transformer_config(case: Case) -> Any:
    """Megatron-Core's own configuration, as far as the converters read it."""
    fields = {name: getattr(case, field) for name, field in _FIELDS.items()}
    return TransformerConfig(**fields, **_experts(case))


def _experts(case: Case) -> dict[str, Any]:
    if not case.experts:
        return {}
    return {
        "num_moe_experts": case.experts,
        "moe_ffn_hidden_size": case.moe_ffn,
        "moe_router_topk": case.topk,
        "moe_layer_freq": list(case.moe_layers) if case.moe_layers else 1,
        "moe_shared_expert_intermediate_size": case.shared_ffn,
    }


def stacked(state: Mapping[str, torch.Tensor], layers: int) -> State:
    """All layers' tensors of one name as one, along a leading axis; all layers are alike."""
    first = "decoder.layers.0."
    result = {name: value for name, value in state.items() if ".layers." not in name}
    for rest in [name.removeprefix(first) for name in state if name.startswith(first)]:
        every = [state[f"decoder.layers.{layer}.{rest}"] for layer in range(layers)]
        result[f"decoder.layers.{rest}"] = torch.stack(every)
    return result


def stage_of(state: Mapping[str, torch.Tensor], case: Case, pp: int, pp_rank: int) -> State:
    """What one pipeline stage holds of a whole model: its layers, counted from 0, and its ends."""
    layers = Place(1, pp, 0, pp_rank).pp_layers(case.layers)
    held: State = {}
    for name, value in state.items():
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                held[f"decoder.layers.{int(number) - layers[0]}.{rest}"] = value
        elif pp_rank == (0 if name.startswith("embedding.") else pp - 1):
            held[name] = value
    if case.tied and 0 < pp_rank == pp - 1:
        # Megatron-Core copies a tied embedding to the stage that needs it as the output.
        held["output_layer.weight"] = state["embedding.word_embeddings.weight"]
    return held


def shard_of(state: Mapping[str, torch.Tensor], case: Case, tp: int, rank: int) -> State:
    """A tensor-parallel rank's share of a stage."""
    return {name: _cut(name, value, case.gated, tp, rank) for name, value in state.items()}


def _cut(name: str, value: torch.Tensor, gated: bool, tp: int, rank: int) -> torch.Tensor:
    axis = next((axis for end, axis in _CUTS.items() if name.endswith(end)), None)
    if axis is None:
        return value
    halves = value.chunk(2, axis) if gated and "linear_fc1" in name else (value,)
    return torch.cat([half.chunk(tp, axis)[rank] for half in halves], axis)


def reference_single(
    state: Mapping[str, torch.Tensor], config: Any, tp: int, pp: int, dtype: str, **options: Any
) -> list[State]:
    """What `SingleDeviceTRTLLMModelWeightsConverter` makes of a whole model, for every rank.

    Args:
        state: Megatron-Core's names → tensors; left as it is.
        config: a `TransformerConfig`, or anything with its fields.
        tp, pp: the target's sizes.
        dtype: "bfloat16", "float16" or "float32".
        **options: `run_single`'s options, and `new_decoder_architecture` for Falcon's names.
    """
    new_decoder = bool(options.pop("new_decoder_architecture", False))
    converter = run_single(dict(state), config, tp, pp, dtype, **options)
    return split_over_ranks(converter, tp, pp, new_decoder)


def run_single(
    state: State,
    config: Any,
    tp: int,
    pp: int,
    dtype: str,
    *,
    parallel_embedding: bool = False,
    activation: str = "gelu",
    scales: Mapping[str, float] | None = None,
    split_by_layer: bool = True,
    names: Mapping[str, Any] = DEFAULT_CONVERSION_DICT,
) -> Any:
    """The converter after `convert`, which takes the tensors out of the caller's `state`.

    Args:
        activation: TensorRT-LLM's name for it, such as "swiglu".
        scales: a module's target name → what its weight is multiplied by before it becomes e4m3.
        split_by_layer: False where one tensor has all layers, along a leading axis.
        names: Megatron-Core's names → the target's.
    """
    export = ExportConfig(
        inference_tp_size=tp, inference_pp_size=pp, use_parallel_embedding=parallel_embedding
    )
    with stand_ins(single_module):
        converter = single_module.SingleDeviceTRTLLMModelWeightsConverter(
            export, config, DataType[dtype], activation=activation, scales=given_scales(scales)
        )
        converter.convert(state, dict(names), split_by_layer)
    return converter


def split_over_ranks(
    converter: Any, tp: int, pp: int, new_decoder_architecture: bool = False
) -> list[State]:
    """Each world rank's tensors; tensor-parallel ranks run fastest."""
    target_config = SimpleNamespace(new_decoder_architecture=new_decoder_architecture)
    places = [Place(tp, pp, tp_rank, pp_rank) for pp_rank in range(pp) for tp_rank in range(tp)]
    with stand_ins(single_module):
        return [converter.get_local_model_weights_per_gpu(one, target_config) for one in places]


def reference_distributed(
    shards: Sequence[Mapping[str, torch.Tensor]],
    config: Any,
    pp: int,
    pp_rank: int,
    dtype: str,
    vocab: int,
    *,
    activation: str = "gelu",
    scales: Mapping[str, float] | None = None,
    names: Mapping[str, Any] = DEFAULT_CONVERSION_DICT,
) -> list[State]:
    """What `DistributedTRTLLMModelWeightsConverter` makes of one pipeline stage, rank by rank.

    Every rank is run twice: once to learn what it brings to each sum over the group, and once with
    the sums. So no processes are needed, and each sum is the one that the ranks themselves ask for.

    Args:
        shards: the stage's state dicts, one for each tensor-parallel rank; left as they are.
        config: a `TransformerConfig`, or anything with its fields.
        pp, pp_rank: the number of stages, and which one this is.
        dtype: "bfloat16", "float16" or "float32".
        vocab: the tokenizer's vocabulary size.
        activation, scales, names: as in `run_single`.
    """

    def run(tp_rank: int, all_reduce: Callable[..., None]) -> State:
        place = Place(len(shards), pp, tp_rank, pp_rank)
        with stand_ins(distributed_module), a_rank(place, all_reduce):
            converter = distributed_module.DistributedTRTLLMModelWeightsConverter(
                config, DataType[dtype], activation=activation, scales=given_scales(scales)
            )
            converter.convert(dict(shards[tp_rank]), dict(names), vocab)
        return dict(converter.trtllm_model_weights)

    brought: list[list[torch.Tensor]] = [[] for _ in shards]
    for tp_rank in range(len(shards)):
        run(tp_rank, _bringing(brought[tp_rank]))
    return [run(tp_rank, _summing(brought)) for tp_rank in range(len(shards))]


@dataclass(frozen=True)
class Place:
    """The part of TensorRT-LLM 1.2's `Mapping` that the converter asks for."""

    tp_size: int
    pp_size: int
    tp_rank: int
    pp_rank: int

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        stages = torch.tensor_split(torch.arange(num_layers), self.pp_size)
        return [int(layer) for layer in stages[self.pp_rank]]


def given_scales(multipliers: Mapping[str, float] | None) -> dict[str, dict[str, torch.Tensor]]:
    """In the converters' own form; each multiplier has shape [1], as Megatron's helper makes it."""
    return {
        f"{module}.weights_scaling_factor": {
            "trt_llm_scale": torch.tensor([1.0 / value]),
            "weight_multiplier": torch.tensor([value]),
        }
        for module, value in (multipliers or {}).items()
    }


@contextlib.contextmanager
def stand_ins(module: Any) -> Iterator[None]:
    """What both converters lack here: `tensorrt_llm`, tqdm and pinned memory."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_tensorrt_llm())
        stack.enter_context(mock.patch.object(module, "HAVE_TQDM", True))
        stack.enter_context(mock.patch.object(module, "tqdm", _silent, create=True))
        stack.enter_context(mock.patch.object(torch, "empty", _pageable(torch.empty)))
        yield


@contextlib.contextmanager
def _tensorrt_llm() -> Iterator[None]:
    """The two helpers that the converters import from `tensorrt_llm._utils` when they run."""
    utils: Any = ModuleType("tensorrt_llm._utils")
    utils.str_dtype_to_torch = lambda name: getattr(torch, name)
    utils.pad_vocab_size = lambda size, tp: -(-size // tp) * tp
    package: Any = ModuleType("tensorrt_llm")
    package._utils = utils
    stubs = {"tensorrt_llm": package, "tensorrt_llm._utils": utils}
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        # `mock.patch.dict` would also forget every module that is imported meanwhile.
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(before)


def _silent(items: Iterable[Any], desc: str) -> Iterable[Any]:
    return items


def _pageable(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    return allocate


@contextlib.contextmanager
def a_rank(place: Place, all_reduce: Callable[..., None]) -> Iterator[None]:
    """A rank's view of Megatron's process groups, without any process group."""
    answers = {
        "get_tensor_model_parallel_world_size": place.tp_size,
        "get_tensor_model_parallel_rank": place.tp_rank,
        "get_tensor_model_parallel_group": None,
        "get_pipeline_model_parallel_world_size": place.pp_size,
        "get_pipeline_model_parallel_rank": place.pp_rank,
    }
    state = distributed_module.parallel_state
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        for name, answer in answers.items():
            stack.enter_context(patch(state, name, mock.Mock(return_value=answer)))
        stack.enter_context(patch(torch.cuda, "current_device", lambda: torch.device("cpu")))
        stack.enter_context(patch(torch.distributed, "all_reduce", all_reduce))
        yield


def nothing_to_sum(tensor: torch.Tensor, group: object) -> None:
    """An `all_reduce` that nobody calls."""
    raise AssertionError("no sum is expected")


def _bringing(brought: list[torch.Tensor]) -> Callable[..., None]:
    """An `all_reduce` that only notes what the rank brings to each sum."""

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        brought.append(tensor.clone())

    return all_reduce


def _summing(brought: Sequence[Sequence[torch.Tensor]]) -> Callable[..., None]:
    """An `all_reduce` that gives the sums of what all ranks brought, in the same order."""
    sums = iter([torch.stack(parts).sum(0) for parts in zip(*brought, strict=True)])

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        tensor.copy_(next(sums))

    return all_reduce
