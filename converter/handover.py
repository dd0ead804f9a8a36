"""Handing a refit's tensors to a serving engine.

    for update in trtllm_updates(refit, nbytes):
        engine.collective_rpc("update_weights", args=(update,))

    model.load_weights(named_tensors(refit, nbytes))                 # vLLM, in the same process

    for bucket in refit.buckets(nbytes):
        engine.update_weights_from_tensor(named_tensors=bucket)      # SGLang

TensorRT-LLM's `WorkerExtension.update_weights` takes, for each GPU by its UUID, pairs of a name and
what `torch.multiprocessing.reductions.reduce_tensor` makes of a tensor: a function and arguments
with which the other process opens the same memory. `None` says that all have come. None of these
calls was tried against the engine itself. In the tests another process opens TensorRT-LLM's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.multiprocessing.reductions import reduce_tensor

from .refit import Bucket, Refit

Handle = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
Update = dict[str, list[tuple[str, Handle]]]

# Opening a handle twice is free, making one is not: it lives as long as the bucket's memory.
_HANDLES: WeakKeyDictionary[Refit, dict[int, list[Update]]] = WeakKeyDictionary()


def trtllm_updates(
    refit: Refit, nbytes: int, source: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Update | None]:
    """A refit's buckets as `update_weights` takes them one by one, and `None` at the end.

    A bucket is complete when it is yielded: the host waits for the GPU, as the other process
    cannot. It must have been read when the next is asked for, so `update_weights` must have
    returned. The receiver may keep the memory open from one step to the next.

    `nbytes` and `source` are as for `Refit.buckets`.
    """
    known = _HANDLES.setdefault(refit, {}).setdefault(nbytes, [])
    for number, bucket in enumerate(refit.buckets(nbytes, source)):
        if number == len(known):
            known.append(_handles(bucket))
        if refit.device.type == "cuda":
            torch.cuda.current_stream(refit.device).synchronize()
        yield known[number]
    yield None


def named_tensors(
    refit: Refit, nbytes: int, source: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a whole refit, for a loader that copies each before it asks for the next.

    `nbytes` and `source` are as for `Refit.buckets`.
    """
    for bucket in refit.buckets(nbytes, source):
        yield from bucket


def _handles(bucket: Bucket) -> Update:
    if not bucket:
        return {}
    handles = [(name, reduce_tensor(tensor)) for name, tensor in bucket]
    return {device_uuid(bucket[0][1].device): handles}


def device_uuid(device: torch.device) -> str:
    """What TensorRT-LLM calls a GPU; for the CPU, whose memory tests share, "cpu"."""
    if device.type != "cuda":
        return device.type
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
