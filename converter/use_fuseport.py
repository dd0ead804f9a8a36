"""Put fuseport's converters into an imported Megatron-Core, for scripts that must not change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from .megatron import (
    DistributedTRTLLMModelWeightsConverter,
    SingleDeviceTRTLLMModelWeightsConverter,
)

REPLACED = {
    cls.__name__: cls
    for cls in (DistributedTRTLLMModelWeightsConverter, SingleDeviceTRTLLMModelWeightsConverter)
}
PACKAGE = "megatron.core.export.trtllm"


@contextmanager
def use_fuseport() -> Iterator[None]:
    """Within the block, Megatron-Core's `TRTLLMHelper` converts through fuseport.

    Every module of `megatron.core.export.trtllm` that holds one of the two classes is given ours,
    and gets its own back at the end.

    Raises:
        ImportError: Megatron-Core is not installed.
    """
    import_module(f"{PACKAGE}.trtllm_helper")
    places = [
        (module, name, getattr(module, name))
        for path, module in list(sys.modules.items())
        if path.startswith(PACKAGE)
        for name in REPLACED
        if hasattr(module, name)
    ]
    for module, name, _ in places:
        setattr(module, name, REPLACED[name])
    try:
        yield
    finally:
        for module, name, original in places:
            setattr(module, name, original)
