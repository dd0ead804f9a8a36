"""fuseport's converter: a model's weights in the layouts that serving engines load."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint_plan import plan_checkpoint
    from .convert import convert_checkpoint
    from .errors import FuseportError
    from .export import export_state_dict
    from .model import ModelSpec
    from .recipe import Recipe
    from .state import convert_state_dict
    from .verify import verify_checkpoint

__all__ = [
    "FuseportError",
    "ModelSpec",
    "Recipe",
    "convert_checkpoint",
    "convert_state_dict",
    "export_state_dict",
    "plan_checkpoint",
    "verify_checkpoint",
]

# Where they are: torch takes seconds to import, and the command line's help does without it.
_HOMES = {
    "FuseportError": "errors",
    "ModelSpec": "model",
    "Recipe": "recipe",
    "convert_checkpoint": "convert",
    "convert_state_dict": "state",
    "export_state_dict": "export",
    "plan_checkpoint": "checkpoint_plan",
    "verify_checkpoint": "verify",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
