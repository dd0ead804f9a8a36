"""fuseport's converter: Megatron-Core's weights in the layouts that serving engines load."""

from .errors import FuseportError
from .model import ModelSpec
from .recipe import Recipe
from .state import convert_shard, convert_state_dict

__all__ = [
    "FuseportError",
    "ModelSpec",
    "Recipe",
    "convert_shard",
    "convert_state_dict",
]
