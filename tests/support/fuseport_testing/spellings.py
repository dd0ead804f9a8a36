"""Other in-memory spellings of the same model, which Megatron cannot build without a GPU.

Transformer Engine keeps the norms inside the linear layers and the experts as numbered weights;
the legacy grouped MLP keeps all experts in two matrices that are multiplied from the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

State = Mapping[str, torch.Tensor]
GROUPED = ("te", "legacy")
_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


def with_te_norms(state: State) -> dict[str, torch.Tensor]:
    """Transformer Engine's names for the norms in front of linear layers.

    A norm in front of experts keeps its own name there.
    """
    result = {}
    for name, value in state.items():
        layer = name.split(".input_layernorm.")[0].split(".pre_mlp_layernorm.")[0]
        new = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if f"{layer}.mlp.router.weight" not in state:
            new = new.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        result[new] = value
    return result


def with_grouped_experts(state: State, kind: str) -> dict[str, torch.Tensor]:
    """The experts as TEGroupedMLP (`te`) or as GroupedMLP (`legacy`) keeps them."""
    result: dict[str, torch.Tensor] = {}
    columns: dict[str, list[torch.Tensor]] = {}
    for name, value in state.items():
        hit = _EXPERT.fullmatch(name)
        if hit is None:
            result[name] = value
        elif kind == "te":
            result[f"{hit[1]}.{hit[3]}.weight{hit[2]}"] = value
        else:
            columns.setdefault(f"{hit[1]}.weight{hit[3][-1]}", []).append(value.T)
    return result | {name: _legacy(name, experts) for name, experts in columns.items()}


def _legacy(name: str, experts: list[torch.Tensor]) -> torch.Tensor:
    """weight1 is [H, E·F'] and weight2 [E·F, H], both being views of [E, in, out] in memory."""
    stacked = torch.stack(experts)
    hidden = stacked.shape[1] if name.endswith("1") else stacked.shape[2]
    return stacked.reshape(hidden, -1) if name.endswith("1") else stacked.reshape(-1, hidden)
