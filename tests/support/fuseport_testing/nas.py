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
_BLOCKS: list[Any] = [
    {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
]


# Query groups of each layer where they differ.
GROUPS = (4, 2, 1)


def few_kv_heads() -> tuple[Case, State, Any]:
    """Layers of 4, 2 and 1 KV heads for 4 query heads; the configuration has the first's number."""
    case = small(hidden=12, ffn=256, layers=3, query_groups=GROUPS[0])
    state = random_state(case)
    for layer, groups in enumerate(GROUPS):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        state[name] = state[name][: (case.heads + 2 * groups) * case.kv_channels].clone()
    blocks = [
        {"attention": {"n_heads_in_group": case.heads // groups}, "ffn": {"ffn_mult": 1.0}}
        for groups in GROUPS
    ]
    return case, state, _config(case, blocks)


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
    return _config(case, _BLOCKS)


def _config(case: Case, blocks: list[Any]) -> Any:
    encoded = json.dumps({"block_configs": blocks})
    facts = vars(transformer_config(case))
    return SimpleNamespace(**facts, heterogeneous_layers_config_encoded_json=encoded)
