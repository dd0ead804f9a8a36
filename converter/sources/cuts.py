"""How Megatron-Core cuts a tensor over tensor- and expert-parallel ranks.

`RULES` is the table: which tensor is cut along which axis.
"""

from __future__ import annotations

import re
from enum import Enum

from ..errors import ShapeError, UnknownTensorError


class Cut(Enum):
    """How the tensor-parallel ranks share a tensor."""

    COLUMN = "output rows: axis 0"
    GATED = "output rows; with a gated MLP a rank has [gate shard; up shard]"
    ROW = "input columns: axis 1"
    GROUPED_FC1 = "memory [E, H, 2F], cut along F, gate and up apart"
    GROUPED_FC2 = "memory [E, F, H], cut along F"
    REPLICATED = "every rank has it whole"


def _ends(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{pattern})$")


RULES: tuple[tuple[re.Pattern[str], Cut], ...] = (
    (_ends(r"embedding\.word_embeddings\.weight"), Cut.COLUMN),
    (_ends(r"output_layer\.(?:weight|bias)"), Cut.COLUMN),
    (_ends(r"linear_qkv\.(?:weight|bias)"), Cut.COLUMN),
    (_ends(r"linear_(?:q|q_up|kv_up)_proj\.(?:weight|bias)"), Cut.COLUMN),
    (_ends(r"core_attention\.softmax_offset"), Cut.COLUMN),
    (_ends(r"eh_proj\.weight"), Cut.COLUMN),
    # Nemotron-NAS: a whole block replaced by one matrix.
    (_ends(r"self_attention\.weight|mlp\.weight"), Cut.COLUMN),
    (_ends(r"linear_fc1\.(?:weight|bias)\d*"), Cut.GATED),
    (_ends(r"linear_fc2\.weight\d*"), Cut.ROW),
    (_ends(r"linear_proj\.weight"), Cut.ROW),
    (_ends(r"experts\.weight1"), Cut.GROUPED_FC1),
    (_ends(r"experts\.weight2"), Cut.GROUPED_FC2),
    (_ends(r"linear_(?:proj\.bias|fc2\.bias\d*)"), Cut.REPLICATED),
    (_ends(r"\w*layer_?norm[._](?:weight|bias)"), Cut.REPLICATED),
    (_ends(r"(?:enorm|hnorm)\.(?:weight|bias)"), Cut.REPLICATED),
    (_ends(r"linear_(?:q|kv)_down_proj\.(?:weight|bias)"), Cut.REPLICATED),
    (_ends(r"router\.(?:weight|bias|expert_bias)"), Cut.REPLICATED),
    (_ends(r"shared_experts\.gate_weight"), Cut.REPLICATED),
    (_ends(r"position_embeddings\.weight"), Cut.REPLICATED),
    (_ends(r"rotary_pos_emb\.inv_freq"), Cut.REPLICATED),
)

_EXPERT = re.compile(
    r"^(.*\.experts\.(?:local_experts\.)?)(?:(\d+)(\..+)|(linear_fc[12]\.(?:weight|bias))(\d+))$"
)


def cut_of(name: str) -> Cut:
    """How tensor-parallel ranks share a tensor. Raises UnknownTensorError: no rule says."""
    for pattern, cut in RULES:
        if pattern.search(name):
            return cut
    raise UnknownTensorError(f"{name}: no rule says how tensor-parallel ranks share it")


def is_expert(name: str) -> bool:
    """True for a tensor of one expert, whose number counts from its expert rank's first."""
    return _EXPERT.match(name) is not None


def numbered_expert(name: str, first: int, count: int) -> str:
    """The name with its expert, one of `count`, numbered from `first` on; others as they are.

    Raises:
        ShapeError: the expert's number is not below `count`.
    """
    match = _EXPERT.match(name)
    if match is None:
        return name
    prefix, before, rest, part, behind = match.groups()
    local = int(before or behind)
    if local >= count:
        raise ShapeError(f"{name}: an expert rank has {count} experts")
    return f"{prefix}{first + local}{rest}" if before else f"{prefix}{part}{first + local}"
