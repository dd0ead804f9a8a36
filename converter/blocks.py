"""Heterogeneous models (Nemotron-NAS): what each layer holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ModelError
from .facts import SIZE, SIZE_OR_NONE, make_plain, need, one_of


@dataclass(frozen=True)
class Block:
    """What one layer of a heterogeneous model (Nemotron-NAS) holds.

    `attention` and `mlp` are "full", "linear" (replaced by one matrix) or "none" (left out).
    `linear_rows` is what a shard has of such a matrix; 0 is all of it.
    """

    attention: str
    num_query_groups: int
    mlp: str
    ffn_hidden_size: int
    linear_rows: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("attention", "mlp"):
            one_of(("full", "linear", "none")).check(f"blocks' {name}", getattr(self, name))
        SIZE.check("blocks' num_query_groups", self.num_query_groups)
        SIZE_OR_NONE.check("blocks' ffn_hidden_size", self.ffn_hidden_size)

    def shard(self, tp_size: int, hidden_size: int) -> Block:
        """What a tensor-parallel shard of the layer holds."""
        groups, rows = max(self.num_query_groups // tp_size, 1), hidden_size // tp_size
        return Block(self.attention, groups, self.mlp, self.ffn_hidden_size // tp_size, rows)


def read_blocks(facts: Mapping[str, object]) -> tuple[Block, ...]:
    """Blocks from `heterogeneous_layers_config_encoded_json` (DeciLM's `block_configs`)."""
    given = facts.get("blocks")
    encoded = facts.get("heterogeneous_layers_config_encoded_json")
    try:
        if given:
            return tuple(one if isinstance(one, Block) else Block(**one) for one in given)  # type: ignore[attr-defined]
        blocks = json.loads(str(encoded))["block_configs"] if encoded else ()
        heads, hidden = need(facts, "num_attention_heads", SIZE), need(facts, "hidden_size", SIZE)
        return tuple(_block(entry["attention"], entry["ffn"], heads, hidden) for entry in blocks)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"the layers' blocks (blocks, heterogeneous_layers_config_encoded_json) cannot be "
            f"read: {error!r}; expected an attention and an MLP for each layer"
        ) from error


def _block(attention: dict[str, object], ffn: dict[str, object], heads: int, hidden: int) -> Block:
    groups = heads // int(attention.get("n_heads_in_group") or heads)  # type: ignore[call-overload]
    # DeciLM rounds the MLP's width up to a multiple of 256 (as Megatron's heterogeneous config).
    width = int(2 * float(ffn.get("ffn_mult") or 0) * hidden / 3)  # type: ignore[arg-type]
    return Block(_replaced(attention), groups, _replaced(ffn), -(-width // 256) * 256)


def _replaced(entry: dict[str, object]) -> str:
    if entry.get("no_op"):
        return "none"
    return "linear" if entry.get("replace_with_linear") else "full"
