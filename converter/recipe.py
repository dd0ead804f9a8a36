"""What the user chooses: the target, its parallel sizes and its dtype."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .choices import (
    CACHES,
    DTYPE_NAMES,
    FROM_SOURCE,
    MTP,
    PROFILES,
    QUANTS,
    SHARD_SIZE,
    TARGETS,
    USUAL_EXCLUDES,
)
from .errors import RecipeError
from .facts import make_plain
from .hf_family import Table, make_family
from .model import ModelSpec
from .scales import table_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choice of a conversion.

    `tp_size` and `pp_size` are the target's tensor and pipeline parallel sizes. Experts are split
    `moe_ep_size` ways by expert and `tp_size / moe_ep_size` ways inside each expert. With
    `use_parallel_embedding` the embeddings are sharded by rows, else every rank has them whole.

    For target "hf", `shard_size` is the most bytes of tensors in one file, and `family` the
    contents of a table for an architecture that the package has none for
    (docs/adding-an-architecture.md). `profile` is who reads the result, where engines differ in how
    they are told of quantised weights. `mtp` says if layers that predict further tokens are kept.

    `quant` says how linear weights are quantised, with scales computed from the weights: "fp8" (one
    scale a tensor), "fp8-row", "fp8-block" (128 × 128), "mxfp8" (1 × 32), "nvfp4" (1 × 16).
    `exclude` are patterns (`*`, `?`) of modules, by the target's names with layers numbered in the
    whole model, whose weights stay as they are; with one of a fused group the whole group does.

    The first `keep_first` and the last `keep_last` layers stay as they are, too. `kv_cache` "fp8"
    says that engines keep keys and values in e4m3, with given scales or 1.0.

    `scales` are given scales, as a JSON file of them holds them (docs/scales.md), or "source" for
    those that Transformer Engine left in a Megatron checkpoint.

    Raises:
        RecipeError: a size is not positive, or the target or dtype is not known.
        ScaleError: `scales` are no such table.
    """

    target: str = "trtllm"
    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1
    dtype: str = "bfloat16"
    use_parallel_embedding: bool = False
    gpus_per_node: int = 8
    shard_size: int = SHARD_SIZE
    family: Table | None = None
    profile: str = PROFILES[0]
    mtp: str = MTP[0]
    quant: str = "none"
    exclude: tuple[str, ...] = USUAL_EXCLUDES
    scales: Mapping[str, Mapping[str, float]] | str | None = None
    keep_first: int = 0
    keep_last: int = 0
    kv_cache: str = "none"

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("tp_size", "pp_size", "moe_ep_size", "gpus_per_node", "shard_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{name} must be a whole number of at least 1, found {value!r}")
        self._check_kept()
        choices = (
            ("dtype", tuple(DTYPES)), ("target", TARGETS), ("quant", QUANTS), ("profile", PROFILES),
            ("mtp", MTP), ("kv_cache", CACHES),
        )  # fmt: skip
        for name, known in choices:
            if (value := getattr(self, name)) not in known:
                kind = "" if isinstance(value, str) else ", as a str"
                raise RecipeError(
                    f"{name} {value!r} is none of {', '.join(known)}; choose one{kind}"
                )
        if not isinstance(self.use_parallel_embedding, bool):
            raise RecipeError(
                f"use_parallel_embedding must be True or False, found "
                f"{self.use_parallel_embedding!r}"
            )
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        if self.scales is not None and self.scales != FROM_SOURCE:
            # A copy, as fp32 and so as JSON has it: the caller's may change.
            object.__setattr__(self, "scales", table_of(self.scales, "scales").entries)
        if self.family is not None:
            make_family(self.family, "of the recipe")

    def _check_kept(self) -> None:
        for name in ("keep_first", "keep_last"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise RecipeError(f"{name} must be a whole number of layers, found {value!r}")
            if value and self.quant == "none":
                raise RecipeError(f"{name} = {value}, but nothing is quantised; give a quant")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    @property
    def world_size(self) -> int:
        """Number of ranks, each of which loads one file."""
        return self.tp_size * self.pp_size

    @property
    def moe_tp_size(self) -> int:
        """How many ranks share one expert."""
        return self.tp_size // self.moe_ep_size


def matches(module: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is a module's."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _patterns(given: object) -> tuple[str, ...]:
    """Patterns as a tuple; a manifest has a list."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) for one in given):
        raise RecipeError(f"exclude must be a list of patterns, found {given!r}")
    return tuple(given)


def check(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise RecipeError if this model cannot be split this way; the message says what divides."""
    tp = recipe.tp_size
    _divides("num_attention_heads", spec.num_attention_heads, "tp_size", tp)
    for layer in range(spec.num_layers):
        block = spec.block(layer)
        if block.attention == "full":
            _shares_heads(block.num_query_groups, tp)
        if block.mlp == "full" and not spec.is_moe(layer):
            _divides("ffn_hidden_size", block.ffn_hidden_size, "tp_size", tp)
        if "linear" in (block.attention, block.mlp):
            _divides("hidden_size", spec.hidden_size, "tp_size", tp)
    if not spec.num_moe_experts and recipe.moe_ep_size > 1:
        raise RecipeError(
            f"moe_ep_size = {recipe.moe_ep_size}, but the model has no experts; leave out "
            f"moe_ep_size (--ep)"
        )
    if spec.num_moe_experts:
        _divides("tp_size", tp, "moe_ep_size", recipe.moe_ep_size)
        _divides("num_moe_experts", spec.num_moe_experts, "moe_ep_size", recipe.moe_ep_size)
        _divides("moe_ffn_hidden_size", spec.moe_ffn_hidden_size, "moe_tp_size", recipe.moe_tp_size)
        shared = spec.moe_shared_expert_intermediate_size
        _divides("moe_shared_expert_intermediate_size", shared, "tp_size", tp)
    if recipe.pp_size > spec.num_layers:
        raise RecipeError(
            f"pp_size = {recipe.pp_size} exceeds the {spec.num_layers} layers; choose a smaller one"
        )


def _divides(what: str, size: int, by: str, parts: int) -> None:
    if size % parts:
        raise RecipeError(
            f"{what} = {size} cannot be split evenly by {by} = {parts}; choose a {by} that "
            f"divides it"
        )


def _shares_heads(groups: int, tp: int) -> None:
    if groups % tp and tp % groups:
        raise RecipeError(
            f"num_query_groups = {groups} and tp_size = {tp}: one must divide the other, so that "
            f"each rank has whole KV heads or each KV head is repeated evenly"
        )
