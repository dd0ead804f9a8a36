"""fuseport's converter: a model's weights in the layouts that serving engines load."""

from .checkpoint_plan import plan_checkpoint
from .convert import convert_checkpoint, export_state_dict
from .errors import FuseportError
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
