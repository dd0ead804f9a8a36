"""The drop-in beside Megatron-Core's own converter: one rank of a Llama-3-70B, in one process.

    python -m benchmarks.bench_dropin [--layers 80]

Needs a GPU and megatron-core. Both convert the same state dict; the results are compared bit for
bit before a figure is printed. Prints the time of each call with the output on the GPU and on the
host, the copy rates measured in the same run, and the extra GPU memory at its peak.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel

from .bench_rank import MODULES, TP, shard
from .measure import copy_bandwidth, machine, milliseconds
from .models import LLAMA_70B

Convert = Callable[[], dict[str, torch.Tensor]]


def config(layers: int) -> types.SimpleNamespace:
    """The fields of a TransformerConfig that the converters read."""
    return types.SimpleNamespace(
        num_layers=layers,
        hidden_size=LLAMA_70B.hidden_size,
        ffn_hidden_size=LLAMA_70B.ffn_hidden_size,
        num_attention_heads=LLAMA_70B.num_attention_heads,
        num_query_groups=LLAMA_70B.num_query_groups,
        kv_channels=LLAMA_70B.kv_channels,
        layernorm_zero_centered_gamma=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        virtual_pipeline_model_parallel_size=None,
    )


def scales(layers: int) -> dict[str, dict[str, torch.Tensor]]:
    """A scale for every linear weight, as the reference takes them."""
    pair = {name: torch.tensor([value], device="cuda") for name, value in
            (("trt_llm_scale", 0.02), ("weight_multiplier", 50.0))}  # fmt: skip
    return {
        f"transformer.layers.{layer}.{module}.weights_scaling_factor": pair
        for layer in range(layers)
        for module in MODULES
    }


@contextmanager
def megatron_converter(on_gpu: bool) -> Iterator[Any]:
    """Megatron's module with what it needs from TensorRT-LLM and its parallel state in place."""
    package, utils = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm._utils")
    utils.str_dtype_to_torch = lambda name: getattr(torch, name)  # type: ignore[attr-defined]
    from megatron.core import parallel_state as state
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as module,
    )

    stubs = {"tensorrt_llm": package, "tensorrt_llm._utils": utils}
    place = {
        "get_tensor_model_parallel_world_size": TP,
        "get_tensor_model_parallel_rank": 0,
        "get_pipeline_model_parallel_world_size": 1,
        "get_pipeline_model_parallel_rank": 0,
        "get_tensor_model_parallel_group": None,
    }
    getters: dict[str, Any] = {name: mock.Mock(return_value=v) for name, v in place.items()}
    empty = torch.empty

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if on_gpu and kwargs.pop("pin_memory", False):
            kwargs["device"] = "cuda"
        return empty(*args, **kwargs)

    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.multiple(state, **getters),
        mock.patch.object(module, "tqdm", lambda items, **_: items),
        mock.patch.object(module.torch, "empty", allocate),
    ):
        yield module


def reference(state: dict[str, torch.Tensor], layers: int, fp8: bool) -> Convert:
    """Megatron's conversion; where it puts the output is up to `megatron_converter`."""

    def convert() -> dict[str, torch.Tensor]:
        from megatron.core.export.data_type import DataType
        from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import (
            DEFAULT_CONVERSION_DICT as NAMES,
        )
        from megatron.core.export.trtllm.trtllm_weights_converter import (
            distributed_trtllm_model_weights_converter as module,
        )

        made = module.DistributedTRTLLMModelWeightsConverter(
            config(layers), DataType.bfloat16, activation="swiglu",
            scales=scales(layers) if fp8 else {},
        )  # fmt: skip
        made.convert(dict(state), NAMES, LLAMA_70B.vocab_size)
        weights: dict[str, torch.Tensor] = made.trtllm_model_weights
        return weights

    return convert


def ours(state: dict[str, torch.Tensor], layers: int, fp8: bool, output: str) -> Convert:
    """Fuseport's conversion, by one converter that is used again."""
    converter = DistributedTRTLLMModelWeightsConverter(
        config(layers), "bfloat16", activation="swiglu", parallel=Parallel(TP, 0),
        scales=scales(layers) if fp8 else {}, output=output,
    )  # fmt: skip

    def convert() -> dict[str, torch.Tensor]:
        converter.convert(state, {}, LLAMA_70B.vocab_size or 0)
        return converter.trtllm_model_weights

    return convert


def calls(convert: Convert, repeats: int) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Seconds of each call, the peak of extra GPU memory in bytes, and the last result."""
    times: list[float] = []
    result: dict[str, torch.Tensor] = {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        result = {}
        gc.collect()
        began = time.perf_counter()
        result = convert()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times, torch.cuda.max_memory_allocated() - before, result


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit equality, name by name; the reference hands out transposed views."""
    return one.keys() == other.keys() and all(
        torch.equal(
            one[name].contiguous().view(torch.uint8).cpu(),
            other[name].contiguous().view(torch.uint8).cpu(),
        )
        for name in one
    )


def compare(state: dict[str, torch.Tensor], layers: int, fp8: bool, output: str) -> None:
    """Both converters, checked and timed."""
    mine, extra, found = calls(ours(state, layers, fp8, output), 4)
    with megatron_converter(on_gpu=output == "cuda"):
        theirs, peak, expected = calls(reference(state, layers, fp8), 2)
    label = f"{'e4m3' if fp8 else 'bf16'} on {output}"
    if not is_same(found, expected):
        print(f"{label:14} RED: the results differ; no figure")
        return
    size = sum(tensor.nbytes for tensor in found.values())
    show = " ".join
    print(
        f"{label:14} {size / 1e9:5.1f} GB  fuseport {show(f'{t * 1e3:.0f}' for t in mine)} ms, "
        f"extra {extra / 2**20:.0f} MiB  Megatron {show(f'{t * 1e3:.0f}' for t in theirs)} ms, "
        f"extra {peak / 2**20:.0f} MiB  ratio first {theirs[0] / mine[0]:.1f} "
        f"warm {min(theirs) / min(mine):.1f}  {size / min(mine) / 1e9:.1f} GB/s",
        flush=True,
    )


def to_host_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per millisecond from the GPU into pinned memory."""
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return nbytes / milliseconds(lambda: pinned.copy_(source, non_blocking=True))


def main() -> None:
    """Run the four cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    layers = parser.parse_args().layers
    print(f"{machine()}\ncopy {copy_bandwidth() / 1e6:.0f} GB/s")
    print(f"device to pinned host {to_host_bandwidth() / 1e6:.1f} GB/s")
    state = shard(LLAMA_70B.replace(num_layers=layers), TP)
    state["decoder.final_layernorm.weight"] = torch.randn(
        LLAMA_70B.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    for fp8 in (True, False):
        for output in ("cuda", "host"):
            compare(state, layers, fp8, output)


if __name__ == "__main__":
    main()
