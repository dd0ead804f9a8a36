"""`config.json` for the Hugging Face layout: the source's own, or made from the facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from ..errors import UnsupportedOptionError
from ..hf_family import Family
from ..model import ModelSpec
from ..recipe import Recipe
from ..sources.hf_config import LLAMA3, facts_of

# transformers' names of activation functions, where they are others. Both sides' gelu is exact.
ACTIVATIONS = {"squared_relu": "relu2"}

# DeepSeek's first layers are dense; others say which.
DENSE_FIRST = "first_k_dense_replace"
# Facts whose 0 is config.json's null.
ZERO_IS_NONE = ("q_lora_rank",)
# What a family stores in its own way, what a target's vocabulary says, and what has no key.
OWN_WAY = (
    "layernorm_zero_centered_gamma", "vocab_size", "model_type", "num_local_experts", "moe_layers",
    "max_position_embeddings", "further_layers",
)  # fmt: skip


# What a quantised source says of itself.
QUANTISED = ("quantization_config", "compression_config")
OTHER_FAMILY = (
    "choose another family as the fact model_type (--fact model_type=NAME), or give a table as "
    "family (--family FILE)"
)
OWN_CONFIG = "the source's config.json is taken over, so correct it there"


def hf_config(
    spec: ModelSpec,
    recipe: Recipe,
    vocab_size: int,
    family: Family,
    own: Mapping[str, object] | None = None,
    quantization: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The contents of config.json.

    Args:
        spec, recipe, family: as for the rules.
        vocab_size: rows of the embedding as written.
        own: the source's config.json, if it has one: it is kept, but for dtype and vocabulary.
        quantization: its `quantization_config`, if it is to have one.

    Raises:
        UnsupportedOptionError: the family cannot say one of the facts, or `own` says another.
    """
    spec = spec.replace(vocab_size=vocab_size)
    if own is None:
        config = _from_facts(spec, family)
        _check_says(spec, config, family, {*OWN_WAY, *_idle(spec)}, OTHER_FAMILY)
    else:
        config = {key: value for key, value in own.items() if key not in QUANTISED}
        _check_says(spec, config, family, {"vocab_size", "further_layers"}, OWN_CONFIG)
    config["vocab_size"] = vocab_size
    # From 5 on transformers calls it dtype; engines know the old name.
    config |= {"dtype": recipe.dtype, "torch_dtype": recipe.dtype}
    if quantization:
        config["quantization_config"] = quantization
    if family.drops_extra_layers:
        config[family.drops_extra_layers] = spec.further_layers
    return config


def _from_facts(spec: ModelSpec, family: Family) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: value for key, value in family.defaults.items() if value is not None},
        "hidden_act": ACTIVATIONS.get(spec.activation_func, spec.activation_func),
    }
    for fact, keys in family.config.items():
        value = getattr(spec, fact)
        if fact in ZERO_IS_NONE:
            config[keys[0]] = value or None
        elif value is not None:
            config[keys[0]] = ACTIVATIONS.get(value, value) if fact == "activation_func" else value
    return config | _rope(spec) | _experts(spec, family) | dict(family.written)


def _rope(spec: ModelSpec) -> dict[str, object]:
    """The spelling of transformers 4, which engines read and transformers 5 takes over."""
    scaling: dict[str, object] | None = None
    if spec.yarn is not None:
        scaling = spec.yarn.as_hf()
    elif spec.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": spec.rope_scaling_factor, **LLAMA3}
    elif spec.seq_len_interpolation_factor is not None:
        scaling = {"rope_type": "linear", "factor": spec.seq_len_interpolation_factor}
    return {"rope_theta": spec.rotary_base, "rope_scaling": scaling}


def _experts(spec: ModelSpec, family: Family) -> dict[str, object]:
    """Which layers are dense, in the family's way, and DeepSeek's shared experts and groups."""
    dense = [layer for layer in range(spec.num_layers) if not spec.is_moe(layer)]
    if not spec.num_moe_experts or DENSE_FIRST not in family.defaults:
        return {"mlp_only_layers": dense} if spec.num_moe_experts and dense else {}
    groups, chosen = spec.moe_router_num_groups or 1, spec.moe_router_group_topk or 1
    if groups > 1 and spec.moe_router_topk // chosen != 2:
        raise UnsupportedOptionError(
            f"moe_router_topk = {spec.moe_router_topk} and moe_router_group_topk = {chosen}: a "
            f"group's score is then not the sum of its two best, which the family "
            f"{family.model_type} takes"
        )
    shared = spec.moe_shared_expert_intermediate_size // spec.moe_ffn_hidden_size
    return {DENSE_FIRST: len(dense), "n_shared_experts": shared, "n_group": groups,
            "topk_group": chosen}  # fmt: skip


def _idle(spec: ModelSpec) -> tuple[str, ...]:
    """Facts that say nothing about this model: of experts without experts, or of dense layers."""
    if not spec.num_moe_experts:
        return "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"
    dense = any(not spec.is_moe(layer) for layer in range(spec.num_layers))
    return () if dense else ("ffn_hidden_size",)


def _check_says(
    spec: ModelSpec,
    config: Mapping[str, object],
    family: Family,
    passed_over: Collection[str],
    hint: str,
) -> None:
    """Read the config back: a fact that comes back otherwise is one that it cannot say."""
    back = ModelSpec.from_facts(facts_of(config, family))
    layers = range(spec.num_layers)
    if [back.is_moe(layer) for layer in layers] != [spec.is_moe(layer) for layer in layers]:
        raise UnsupportedOptionError(
            f"the family {family.model_type} cannot say which layers have experts"
        )
    for fact in dataclasses.fields(ModelSpec):
        mine, its = getattr(spec, fact.name), getattr(back, fact.name)
        if fact.name not in passed_over and mine != its:
            raise UnsupportedOptionError(
                f"the model has {fact.name} = {mine!r}, but its config.json of the family "
                f"{family.model_type} means {its!r}; {hint}"
            )
