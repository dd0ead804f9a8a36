"""What a `config.json` says, as facts in Megatron-Core's terms.

A family's table names the key of each fact; here is what all families share: rotary positions in
their three spellings, layers with experts, and the options that no fact says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import SourceError
from ..fact_names import OTHER
from ..hf_family import Family, Table
from ..yarn import Yarn

# Key → the values with which it changes nothing. Targets that do not take the source's own
# config.json over refuse any other.
HARMLESS: dict[str, tuple[object, ...]] = {
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_output_gate": (None, False),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1.0),
    "moe_layer_freq": (None, 1),
    "n_group": (None, 1),
    "no_rope_layers": (None, []),
    "norm_topk_prob": (None, True),
    "residual_multiplier": (None, 1.0),
    "routed_scaling_factor": (None, 1.0),
    "scoring_func": (None, "softmax"),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "use_bidirectional_attention": (None, False),
}

# Llama 3.1's own bounds, which Megatron-Core and TensorRT-LLM take for granted.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def facts_of(config: Mapping[str, object], family: Family) -> dict[str, object]:
    """The facts of a model, `special` among them: set options that no fact says.

    Raises:
        SourceError: a value is of the wrong kind.
    """
    values = {**family.defaults, **config}
    facts: dict[str, object] = {"position_embedding_type": "rope"}
    for fact, keys in family.config.items():
        facts[fact] = next((values[key] for key in keys if values.get(key) is not None), None)
    facts |= family.facts
    try:
        facts |= _experts(values, facts)
        rope, scaled = _rope(values, "rotary_percent" in family.config)
        facts |= rope
        special = tuple(_special(values, config, family))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise SourceError(f"config.json makes no sense: {error!r}") from error
    if "yarn" not in facts:
        facts["rope_type"] = "rope"
    facts["layernorm_zero_centered_gamma"] = family.zero_centred_norms
    facts["model_type"] = family.unified or OTHER
    facts["special"] = tuple(sorted({*family.special, *special, *scaled}))
    return {name: value for name, value in facts.items() if value is not None}


def extra_layers(config: Mapping[str, object], family: Family) -> range:
    """The numbers of the layers behind the last one."""
    count = config.get(family.drops_extra_layers or "") or 0
    first = config.get(family.config["num_layers"][0])
    if type(count) is not int or type(first) is not int or not 0 <= count < 100:
        return range(0)
    return range(first, first + count)


def _special(values: Table, config: Mapping[str, object], family: Family) -> Iterable[str]:
    said = {key for keys in family.config.values() for key in keys}
    for key, harmless in HARMLESS.items():
        # Qwen keeps the size of a window that it does not use.
        unused = key == "sliding_window" and values.get("use_sliding_window") is False
        if key not in said and not unused and values.get(key) not in harmless:
            yield key
    kinds = config.get("layer_types") or ()
    if any(kind != "full_attention" for kind in kinds):  # type: ignore[attr-defined]
        yield "layer_types"


def _experts(values: Mapping[str, object], facts: Mapping[str, object]) -> dict[str, object]:
    """Which layers have experts (Qwen: step and exceptions; DeepSeek: the first are dense)."""
    layers = facts.get("num_layers")
    if not facts.get("num_moe_experts") or type(layers) is not int or not 0 < layers <= 100_000:
        return {}
    step = int(values.get("decoder_sparse_step") or 1)  # type: ignore[call-overload]
    dense = set(values.get("mlp_only_layers") or ())  # type: ignore[call-overload]
    first = int(values.get("first_k_dense_replace") or 0)  # type: ignore[call-overload]
    chosen = tuple(
        layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)
    )
    width = values.get("moe_intermediate_size")
    shared = values.get("n_shared_experts") or 0
    wide = {"moe_shared_expert_intermediate_size": shared * width} if shared else {}  # type: ignore[operator]
    return {"moe_layers": chosen, **wide}


def _rope(values: Mapping[str, object], partial: bool) -> tuple[dict[str, object], tuple[str, ...]]:
    """Rotary facts, and the names of options that no fact says.

    `partial` says if the family's models may rotate a part of each head.

    Up to transformers 4: `rope_theta`, `partial_rotary_factor` and `rope_scaling`, whose kind is
    `type` or `rope_type`; from 5 on: all of them in `rope_parameters`.
    """
    given: Mapping[str, object] = values.get("rope_parameters") or {}  # type: ignore[assignment]
    if any(isinstance(one, Mapping) for one in given.values()):
        # Layers of different kinds have their own rotary positions.
        return {}, ("rope_parameters",)
    scaling: Mapping[str, object] = values.get("rope_scaling") or given  # type: ignore[assignment]
    part = given.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
    facts = {
        "rotary_base": given.get("rope_theta", values.get("rope_theta", 10000.0)),
        "rotary_percent": part if partial else 1.0,
    }
    if part != facts["rotary_percent"]:
        return facts, ("partial_rotary_factor",)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor")
    if kind in ("default", None):
        return facts, ()
    if kind == "linear":
        return {**facts, "seq_len_interpolation_factor": factor}, ()
    if kind == "llama3" and all(scaling.get(key) == value for key, value in LLAMA3.items()):
        return {**facts, "use_rope_scaling": True, "rope_scaling_factor": factor}, ()
    if kind == "yarn":
        return {**facts, "yarn": Yarn.from_hf(scaling)}, ("rope_scaling",)
    return facts, ("rope_scaling",)
