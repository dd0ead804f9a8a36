"""A model without the layers that predict further tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..model import ModelSpec
from .megatron_names import FURTHER, unwrapped

Value = TypeVar("Value")


def without_further(
    tensors: Mapping[str, Value], spec: ModelSpec
) -> tuple[Mapping[str, Value], ModelSpec]:
    """A model without the layers behind the last one that its facts say there are."""
    if not spec.further_layers:
        return tensors, spec
    left = {name: one for name, one in tensors.items() if not unwrapped(name).startswith(FURTHER)}
    return left, spec.replace(further_layers=0)
