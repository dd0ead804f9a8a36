"""What a quantised linear must hold, read off a checkpoint's own settings alone.

Written from the formats' documentation, not from the table that lays scales out: each row gives
the shape of the codes and of each scale of a linear [out, in].
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Rows = Callable[[int, int], Mapping[str, Shape]]

# The last parts of modules that are matrices and never quantised: embeddings and routers.
NEVER = ("embed_tokens", "gate", "vocab_embedding", "lm_head")


def _nvfp4(o: int, i: int) -> Mapping[str, Shape]:
    return {"weight": (o, i // 2), "weight_scale": (o, i // 16), "weight_scale_2": ()}


HF: dict[str, Rows] = {
    "FP8": lambda o, i: {"weight": (o, i), "weight_scale": ()},
    "MXFP8": lambda o, i: {"weight": (o, i), "weight_scale": (o, i // 32)},
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
    "FP8_PER_CHANNEL_PER_TOKEN": lambda o, i: {"weight": (o, i), "weight_scale": (o,)},
    "fp8": lambda o, i: {"weight": (o, i), "weight_scale_inv": (-(-o // 128), -(-i // 128))},
    "fp8, whole": lambda o, i: {"weight": (o, i), "weight_scale": ()},
}
# compressed-tensors, by the strategy for weights.
COMPRESSED: dict[str, Rows] = {
    "tensor": lambda o, i: {"weight": (o, i), "weight_scale": (1,)},
    "channel": lambda o, i: {"weight": (o, i), "weight_scale": (o, 1)},
    "block": lambda o, i: {"weight": (o, i), "weight_scale": (-(-o // 128), -(-i // 128))},
}

UNIFIED: dict[str, Rows] = {
    "FP8": lambda o, i: {
        "weight": (o, i),
        "weights_scaling_factor": (1,),
        "activation_scaling_factor": (1,),
    },
    "FP8_PER_CHANNEL_PER_TOKEN": lambda o, i: {"weight": (o, i), "per_channel_scale": (o,)},
}


def unified_shapes(shapes: Shapes, config: Mapping[str, Any]) -> Shapes:
    """Like `hf_shapes`, of a rank of a unified checkpoint.

    Patterns name layers of the whole model, so nothing is expected of a pipeline stage's.
    """
    stated = config.get("quantization") or {}
    algorithm = stated.get("quant_algo")
    if not algorithm or config["mapping"]["pp_size"] > 1:
        return shapes
    return _quantised(shapes, UNIFIED[algorithm], stated.get("exclude_modules") or [])


def hf_shapes(shapes: Shapes, config: Mapping[str, Any], modelopt: Mapping[str, Any]) -> Shapes:
    """The shapes as they are where the settings say that linears are quantised.

    Args:
        shapes: of a model that is not quantised, by name.
        config: config.json. modelopt: hf_quant_config.json, or nothing.
    """
    own = config.get("quantization_config") or {}
    stated = modelopt.get("quantization") or {}
    algorithm = stated.get("quant_algo") or own.get("quant_algo") or own.get("quant_method")
    if algorithm == "fp8" and "weight_block_size" not in own:
        algorithm = "fp8, whole"
    kept = [
        *stated.get("exclude_modules", ()),
        *own.get("modules_to_not_convert", ()),
        *own.get("ignore", ()),
    ]
    if algorithm == "compressed-tensors":
        groups = own["config_groups"]
        # Without one only the KV cache is quantised.
        if not groups:
            return shapes
        return _quantised(shapes, COMPRESSED[groups["group_0"]["weights"]["strategy"]], kept)
    return _quantised(shapes, HF[algorithm], kept) if algorithm else shapes


def _quantised(shapes: Shapes, rows: Rows, kept: list[str]) -> Shapes:
    found: Shapes = {}
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        never = len(shape) != 2 or module.rpartition(".")[2] in NEVER
        if never or any(fnmatch.fnmatchcase(module, pattern) for pattern in kept):
            found[name] = shape
        else:
            found |= {f"{module}.{part}": size for part, size in rows(*shape).items()}
    return found
