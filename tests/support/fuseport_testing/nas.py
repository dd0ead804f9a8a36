"""A small Nemotron-NAS model: layers with attention or MLP replaced or left out."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from .cases import Case
from .megatron_reference import transformer_config
from .small_models import State, random_state, random_tensors, small

# Attention and MLP of each layer, and the same in DeciLM's words: widths are multiples of 256.
NAS_KINDS = (("full", "full"), ("linear", "full"), ("none", "linear"))
_BLOCKS = [
    {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
]


def nas_model() -> tuple[Case, State]:
    """The case, and fp32 tensors; a layer without attention has no norm in front of it either."""
    case = small(hidden=12, ffn=256, layers=3)
    state = random_state(case)
    for layer, part in ((1, "self_attention"), (2, "self_attention"), (2, "mlp")):
        prefix = f"decoder.layers.{layer}.{part}"
        state = {name: value for name, value in state.items() if not name.startswith(prefix)}
    linears = ("1.self_attention.weight", "2.mlp.weight")
    state |= random_tensors({f"decoder.layers.{name}": (12, 12) for name in linears})
    del state["decoder.layers.2.input_layernorm.weight"]
    return case, state


def nas_config(case: Case) -> Any:
    """With the field that Megatron's heterogeneous configuration adds."""
    encoded = json.dumps({"block_configs": _BLOCKS})
    facts = vars(transformer_config(case))
    return SimpleNamespace(**facts, heterogeneous_layers_config_encoded_json=encoded)
