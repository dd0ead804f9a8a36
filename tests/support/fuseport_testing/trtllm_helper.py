"""Megatron-Core's `TRTLLMHelper` without TensorRT-LLM: stand-ins for what it takes from there."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .megatron_reference import Place, distributed_module, single_module, stand_ins

__all__ = ["helper_module", "model_type", "trtllm", "with_scales"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.export.model_type import ModelType
    from megatron.core.export.trtllm import trtllm_helper as helper_module

model_type = ModelType


@contextlib.contextmanager
def trtllm() -> Iterator[None]:
    """What the helper and the converters lack, while the block runs.

    A configuration is a plain namespace, and a mapping has what the converters ask for.
    """
    stubs: dict[str, Any] = {
        "HAVE_TRTLLM": True,
        "tensorrt_llm": SimpleNamespace(Mapping=_mapping),
        "non_gated_version": {"swiglu": "silu", "gelu": "gelu"}.__getitem__,
        "MoeConfig": mock.Mock(),
        "TRT_MODEL_CONFIG": dict.fromkeys(ModelType, SimpleNamespace),
    }
    with contextlib.ExitStack() as stack:
        for module in (single_module, distributed_module):
            stack.enter_context(stand_ins(module))
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(helper_module, name, stub, create=True))
        yield


def _mapping(world_size: int, rank: int, tp_size: int, pp_size: int) -> Place:
    assert world_size == tp_size * pp_size
    return Place(tp_size, pp_size, rank % tp_size, rank // tp_size)


def with_scales(state: Mapping[str, torch.Tensor], names: Callable[[str], bool]) -> dict[str, Any]:
    """The state dict with Transformer Engine's extra state beside the chosen weights.

    It is a file in memory that holds two scales, the activation's and the weight's.
    """
    result: dict[str, Any] = dict(state)
    for index, name in enumerate(filter(names, state)):
        scale = torch.tensor([3.0, 1.5 + index])
        file = io.BytesIO()
        torch.save({"scale_fwd": scale, "scale_inv_fwd": 1 / scale}, file)
        result[name.removesuffix("weight") + "_extra_state"] = file
    return result
