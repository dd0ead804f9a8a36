"""The facts of a model: what its weights mean, in Megatron-Core's own terms.

Facts come from a TransformerConfig, from the arguments in a checkpoint, from a `run_config.yaml`,
or from the user; they name the same things differently. `fact_names.NAMES` lists every accepted
name of each field, and `ModelSpec.from_facts` reads any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from . import reading
from .blocks import Block, read_blocks
from .errors import ModelError, UnsupportedOptionError
from .fact_names import ACTIVATIONS, LATENT, MODEL_TYPES, NAMES, ONLY, OTHER, REFUSED
from .facts import (
    FLAG,
    LAYERS,
    POSITIVE,
    SIZE,
    SIZE_OR_NONE,
    Kind,
    check_names,
    first,
    infer_model_type,
    loose,
    make_plain,
    need,
    one_of,
    optional,
    plain,
    refuse,
    tuple_of,
)
from .yarn import Yarn

# What is read beside the fields themselves.
PATTERNS = ("moe_layer_freq", "heterogeneous_layers_config_encoded_json")

# Fields that say something of each layer, or name several things.
TUPLES = ("moe_layers", "blocks", "special")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's facts. Sizes count elements; names are Megatron-Core's.

    `kv_channels` is the size of one head. `vocab_size` is the tokenizer's, without padding;
    `None` keeps every row of the source's embedding. `moe_layers` says for each layer whether it
    is a mixture of experts. `num_local_experts` is how many of the experts a shard holds, where it
    does not hold all. `rope_scaling_factor` is Llama 3.1's, `seq_len_interpolation_factor` a linear
    one; `None` is no scaling. `blocks` describes each layer of a heterogeneous model.

    `further_layers` stand behind the last one and predict further tokens.

    Multi-latent attention's sizes are 0 where there is none. `special` names options that not every
    target's config can say; such a target refuses the model by them.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    model_type: str = "llama"
    normalization: str = "RMSNorm"
    layernorm_zero_centered_gamma: bool = False
    layernorm_epsilon: float = 1e-5
    gated_linear_unit: bool = True
    activation_func: str = "silu"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling_factor: float | None = None
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool = False
    num_moe_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_layers: tuple[bool, ...] = ()
    num_local_experts: int = 0
    blocks: tuple[Block, ...] = ()
    attention_out_bias: bool = False
    mlp_bias: bool = False
    moe_router_linear_bias: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_num_groups: int = 0
    moe_router_group_topk: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    yarn: Yarn | None = None
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    further_layers: int = 0
    special: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        for name in TUPLES:
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name, kind in KINDS.items():
            kind.check(name, getattr(self, name))
        heads = self.num_attention_heads
        for groups in (self.num_query_groups, *(block.num_query_groups for block in self.blocks)):
            if heads % groups:
                raise ModelError(
                    f"num_query_groups = {groups} does not divide num_attention_heads = {heads}; "
                    f"correct these facts (--fact)"
                )
        if 0 < self.num_moe_experts < self.moe_router_topk:
            raise ModelError(
                f"moe_router_topk = {self.moe_router_topk} exceeds num_moe_experts = "
                f"{self.num_moe_experts}; correct these facts (--fact)"
            )
        if self.num_moe_experts and self.add_bias_linear:
            raise UnsupportedOptionError(
                "the model sets add_bias_linear and has experts: experts' biases are not "
                "converted; export a model without them"
            )
        for name in ("moe_layers", "blocks"):
            count = len(getattr(self, name))
            if count not in (0, self.num_layers):
                raise ModelError(
                    f"{name} has {count} entries for num_layers = {self.num_layers}; expected one "
                    f"each"
                )

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def has_qkv_bias(self) -> bool:
        """True if q, k and v have biases."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def has_out_bias(self) -> bool:
        """True if attention's output projection has a bias."""
        return self.add_bias_linear or self.attention_out_bias

    @property
    def has_mlp_bias(self) -> bool:
        """True if the MLP's, or the experts', linears have biases."""
        return self.add_bias_linear or self.mlp_bias

    @property
    def norm_shift(self) -> float:
        """What is added to a stored norm weight to get the true one."""
        return 1.0 if self.layernorm_zero_centered_gamma else 0.0

    @property
    def local_experts(self) -> int:
        """Experts that are here: all, unless this describes a shard."""
        return self.num_local_experts or self.num_moe_experts

    def is_moe(self, layer: int) -> bool:
        """True if layer `layer` (counted from 0 over the whole model) has experts."""
        if not self.num_moe_experts:
            return False
        # Layers behind the last one are like it.
        return self.moe_layers[min(layer, self.num_layers - 1)] if self.moe_layers else True

    def block(self, layer: int) -> Block:
        """What layer `layer` holds; the same for every layer unless `blocks` says otherwise."""
        if self.blocks:
            return self.blocks[layer]
        return Block("full", self.num_query_groups, "full", self.ffn_hidden_size)

    @classmethod
    def from_facts(cls, facts: Mapping[str, object], /, **overrides: object) -> ModelSpec:
        """Read facts from any source's mapping; `overrides` (by field name) win, None is no fact.

        Raises:
            ModelError: a fact without which nothing can be done is missing or makes no sense, or
                an override has a name that is not known. Unknown names in `facts` are passed over.
            UnsupportedOptionError: an option that changes the weights' meaning is set.
        """
        if not isinstance(facts, Mapping):
            raise ModelError(
                f"facts must be a mapping of names to values, found {type(facts).__name__}; give "
                f"vars(…) of a configuration or of arguments"
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        check_names(given, {name: NAMES.get(name, ()) for name in GIVEN})
        merged = {name: plain(value) for name, value in {**facts, **given}.items()}
        refuse(merged)
        values = {field: first(merged, names) for field, names in NAMES.items()}
        values = {field: value for field, value in values.items() if value is not None}
        for part in PARTS:
            values |= part(merged)
        values["special"] = reading.special(merged, values)
        values |= {"num_layers": need(merged, "num_layers", LAYERS), "blocks": read_blocks(merged)}
        # What follows from one of the source's facts gives way to what the user says.
        values |= {name: merged[name] for name in (*NAMES, *LATENT) if name in given}
        if "model_type" not in values:
            values["model_type"] = infer_model_type(values)
        typed = {name: loose(KINDS[name], value) for name, value in values.items()}
        return cls(**typed)  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> ModelSpec:
        """What `dataclasses.asdict` and a JSON file have made of one.

        Raises:
            KeyError, TypeError, ValueError, ModelError: it is something else.
        """
        facts = dict(values)
        for name in TUPLES:
            if not isinstance(facts[name], list):
                raise ValueError(f"{name} makes no sense")
        facts["blocks"] = [Block(**block) for block in facts["blocks"]]  # type: ignore[attr-defined]
        facts["yarn"] = None if facts["yarn"] is None else Yarn(**facts["yarn"])  # type: ignore[arg-type]
        return cls(**facts)  # type: ignore[arg-type]

    def replace(self, **changes: object) -> ModelSpec:
        """A copy with some facts changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


# Field → what it may be.
KINDS = {
    "num_layers": LAYERS,
    "hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "ffn_hidden_size": SIZE_OR_NONE,
    "num_query_groups": SIZE,
    "kv_channels": SIZE,
    "vocab_size": optional(SIZE),
    "max_position_embeddings": optional(SIZE),
    "model_type": one_of((*MODEL_TYPES, OTHER)),
    "normalization": one_of(("RMSNorm", "LayerNorm")),
    "layernorm_zero_centered_gamma": FLAG,
    "layernorm_epsilon": POSITIVE,
    "gated_linear_unit": FLAG,
    "activation_func": one_of(dict.fromkeys(ACTIVATIONS.values())),
    "add_bias_linear": FLAG,
    "add_qkv_bias": FLAG,
    "qk_layernorm": FLAG,
    "position_embedding_type": one_of(("rope", "learned_absolute")),
    "rotary_base": POSITIVE,
    "rotary_percent": POSITIVE,
    "rope_scaling_factor": optional(POSITIVE),
    "seq_len_interpolation_factor": optional(POSITIVE),
    "share_embeddings_and_output_weights": FLAG,
    "num_moe_experts": SIZE_OR_NONE,
    "moe_ffn_hidden_size": SIZE_OR_NONE,
    "moe_router_topk": SIZE_OR_NONE,
    "moe_shared_expert_intermediate_size": SIZE_OR_NONE,
    "moe_layers": tuple_of(bool, "a list of true and false"),
    "num_local_experts": SIZE_OR_NONE,
    "blocks": tuple_of(Block, "a list with what each layer holds"),
    "attention_out_bias": FLAG,
    "mlp_bias": FLAG,
    "moe_router_linear_bias": FLAG,
    "moe_router_score_function": one_of(("softmax", "sigmoid")),
    "moe_router_num_groups": SIZE_OR_NONE,
    "moe_router_group_topk": SIZE_OR_NONE,
    "moe_router_topk_scaling_factor": POSITIVE,
    "yarn": optional(Kind("YaRN's numbers", lambda value: isinstance(value, Yarn))),
    "q_lora_rank": SIZE_OR_NONE,
    "kv_lora_rank": SIZE_OR_NONE,
    "qk_head_dim": SIZE_OR_NONE,
    "qk_pos_emb_head_dim": SIZE_OR_NONE,
    "v_head_dim": SIZE_OR_NONE,
    "further_layers": SIZE_OR_NONE,
    "special": tuple_of(str, "a list of options' names"),
}

# The names of facts that a user may give. How many experts a shard holds follows from its place.
GIVEN = (
    *(
        name
        for name in KINDS
        if name not in ("num_local_experts", "special", "yarn", "further_layers")
    ),
    *PATTERNS,
    "multi_latent_attention",
    *REFUSED,
    *ONLY,
)

# What is read from several names together, in this order.
PARTS = (
    reading.heads, reading.activation, reading.experts, reading.tied, reading.rope_scaling,
    reading.latent, reading.router, reading.positions,
)  # fmt: skip
