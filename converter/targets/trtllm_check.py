"""What a unified checkpoint must hold, read off its `config.json` alone.

Written from the format, not from the rules that lay tensors out: shapes by name for every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]

REQUIRED = (
    "architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "vocab_size", "hidden_act",
)  # fmt: skip


def expected_matrices(config: Config, rank: int) -> Shapes:
    """Names and shapes of a rank's matrices: what must be there whatever the family's norms are.

    Heterogeneous models (`layer_configs`) describe each layer themselves and get only the parts
    outside the layers.
    """
    mapping = config["mapping"]
    tp, pp = mapping["tp_size"], mapping["pp_size"]
    stage = rank // tp
    shapes: Shapes = {}
    vocab = -(-config["vocab_size"] // tp)
    if stage == 0:
        rows = vocab if config["use_parallel_embedding"] else config["vocab_size"]
        shapes["transformer.vocab_embedding.weight"] = (rows, config["hidden_size"])
    if stage == pp - 1:
        shapes["transformer.ln_f.weight"] = (config["hidden_size"],)
        if not config["share_embedding_table"] or pp > 1:
            shapes["lm_head.weight"] = (vocab, config["hidden_size"])
    if "layer_configs" not in config:
        for layer in range(_layers(config["num_hidden_layers"], pp, stage)):
            shapes |= _layer(config, f"transformer.layers.{layer}.")
    return shapes


def _layers(count: int, pp: int, stage: int) -> int:
    return count // pp + (stage < count % pp)


def _layer(config: Config, prefix: str) -> Shapes:
    tp, hidden, head = config["mapping"]["tp_size"], config["hidden_size"], config["head_size"]
    queries = config["num_attention_heads"] // tp
    keys = max(config["num_key_value_heads"] // tp, 1)
    shapes: Shapes = {
        prefix + "attention.qkv.weight": ((queries + 2 * keys) * head, hidden),
        prefix + "attention.dense.weight": (hidden, queries * head),
    }
    if "moe" not in config:
        width = config["intermediate_size"] // tp
        shapes[prefix + "mlp.fc.weight"] = (width, hidden)
        shapes[prefix + "mlp.proj.weight"] = (hidden, width)
    return shapes
