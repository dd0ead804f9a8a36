"""What Megatron-Core's two converters share: facts, scales and the run of a plan."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from fuseport.kernels.move import GivenScale, Move

from .arguments import check_given, check_kinds
from .backend import choose
from .choices import FROM_SOURCE
from .claims import PartialClaims
from .errors import FuseportError, ModelError, RecipeError, ScaleError, SourceError
from .layout import leaves
from .model import ModelSpec
from .recipe import DTYPES, Recipe
from .scales import usable
from .sources.megatron import read_model
from .state import zero_row
from .targets.parts import TargetTensor
from .targets.trtllm import TrtllmRules, refuse_special
from .trtllm_layers import is_nemotron_nas

# How the reference's scales are called.
FACTOR, MULTIPLIER = ".weights_scaling_factor", "weight_multiplier"
# Its activations that have a gate.
GATED = ("swiglu", "geglu", "fast-swiglu", "fast-geglu")


def str_dtype_to_torch(dtype: Any) -> torch.dtype:
    """A torch dtype from Megatron's `DataType`, its name ("bfloat16", "fp8", …) or a torch dtype.

    Raises:
        RecipeError: the name is not known.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = str(getattr(dtype, "name", dtype))
    known = {**DTYPES, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "int32": torch.int32}
    if name not in known:
        raise RecipeError(f"dtype {name!r} is none of {', '.join(known)}")
    return known[name]


def _checked_scales(scales: Mapping[str, Any] | None) -> dict[str, Any]:
    """The reference's `scales`.

    Raises:
        ScaleError: an entry for a weight has no number, finite, normal and positive, to multiply
            with.
    """
    check_given(scales=scales)
    for name, scale in (scales or {}).items():
        if not isinstance(name, str):
            raise ScaleError(f"scales has the key {name!r}, expected names such as …{FACTOR}")
        if name.endswith(FACTOR):
            given: object = scale.get(MULTIPLIER) if isinstance(scale, Mapping) else None
            if not _is_number(given):
                raise ScaleError(
                    f"scales: {name} must be a dict with one number as {MULTIPLIER!r}, "
                    f"found {scale!r}"
                )
            # One on a GPU would be waited for.
            if not (isinstance(given, torch.Tensor) and given.device.type != "cpu"):
                number = given.item() if isinstance(given, (torch.Tensor, np.ndarray)) else given
                usable(number, f"scales: {MULTIPLIER} of {name}")
    return dict(scales or {})


def _is_number(given: object) -> bool:
    """Whether it is a real number, or a tensor or an array of one."""
    if isinstance(given, torch.Tensor):
        return given.numel() == 1 and not given.is_complex() and not given.is_meta
    if isinstance(given, np.ndarray):
        return given.size == 1 and given.dtype.kind in "fiu"
    return isinstance(given, Real)


# Megatron's own objects, by the arguments' names → its class, and what is asked of one.
FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer_config": ("TransformerConfig", ("num_attention_heads", "__dict__")),
    "export_config": ("ExportConfig", ("inference_tp_size", "use_parallel_embedding")),
    "mapping": (
        "tensorrt_llm.Mapping",
        ("tp_size", "tp_rank", "pp_layers", "is_first_pp_rank", "is_last_pp_rank"),
    ),
}


def check_fields(error: type[FuseportError], **objects: object) -> None:
    """Raise `error` for an object that lacks what `FIELDS` says of an argument of its name."""
    for name, value in objects.items():
        kind, fields = FIELDS[name]
        lacking = [field for field in fields if not hasattr(value, field)]
        if lacking:
            raise error(
                f"{name} must be a {kind}, or an object with its fields, found "
                f"{type(value).__name__}, which has no {lacking[0]}"
            )


class WeightsConverter:
    """What both converters share: facts, scales, and the run of a plan."""

    def __init__(
        self,
        transformer_config: Any,
        dtype: Any,
        multi_query_mode: bool,
        activation: str,
        scales: Mapping[str, Any] | None,
        backend: str,
    ) -> None:
        check_fields(ModelError, transformer_config=transformer_config)
        self.transformer_config = transformer_config
        self.storage_type = str_dtype_to_torch(dtype)
        self.activation = activation
        self.scales = _checked_scales(scales)
        self.backend = backend
        self.trtllm_model_weights: dict[str, torch.Tensor] = {}
        groups = getattr(transformer_config, "num_query_groups", None)
        heads = transformer_config.num_attention_heads
        self.num_kv_heads: int = groups or (1 if multi_query_mode else heads)

    def facts(self, conversion: Mapping[str, Any]) -> ModelSpec:
        """The whole model's facts. Biases and norms are as the state dict has them."""
        config = vars(self.transformer_config)
        gated = self.activation in GATED or bool(config.get("gated_linear_unit"))
        spec = ModelSpec.from_facts(
            {key: value for key, value in config.items() if key != "activation_func"},
            model_type="nemotron_nas" if is_nemotron_nas(conversion) else "llama",
            num_query_groups=self.num_kv_heads,
            gated_linear_unit=gated,
            activation_func="silu",
        ).replace(
            add_bias_linear=False,
            add_qkv_bias=False,
            qk_layernorm=False,
            normalization="RMSNorm",
            share_embeddings_and_output_weights=False,
            vocab_size=None,
        )
        refuse_special(spec)
        return spec

    def recipe(self, **sizes: Any) -> Recipe:
        """The recipe for this converter's dtype."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        if self.storage_type not in names:
            raise RecipeError(
                f"{self.storage_type} cannot hold every weight; take bfloat16, float16 or float32, "
                f"and give scales for the weights that become fp8"
            )
        return Recipe(dtype=names[self.storage_type], **sizes)

    def given_scales(self, device: torch.device) -> dict[str, GivenScale]:
        """The reference's `scales`, by module; the multiplier is applied before the cast."""
        return {
            name.removesuffix(FACTOR): GivenScale(
                torch.as_tensor(scale[MULTIPLIER], dtype=torch.float32, device=device).reshape(-1)
            )
            for name, scale in self.scales.items()
            if name.endswith(FACTOR)
        }

    def partial_targets(
        self, tensors: Mapping[str, torch.Tensor], spec: ModelSpec, recipe: Recipe
    ) -> list[TargetTensor]:
        """The target tensors that are made of just these tensors of a model."""
        model = read_model(_with_second(tensors, spec), spec, PartialClaims)
        example = next(iter(tensors.values()))
        zeros = zero_row(model, spec, example.device)
        rules = TrtllmRules(model, spec, recipe, zeros, self.given_scales(example.device))
        return [
            target
            for target in rules.tensors()
            if not any(leaf.is_meta for leaf in leaves(target.layout))
        ]

    def cast(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """One tensor in the target's dtype, contiguous."""
        module, _, kind = name.rpartition(".")
        quant = self.given_scales(source.device).get(module) if kind == "weight" else None
        dtype = self.storage_type if quant is None else torch.float8_e4m3fn
        result = torch.empty(source.shape, dtype=dtype, device=source.device)
        choose(self.backend, source.device)([Move(result, source, quant=quant)])
        return result


def _with_second(
    tensors: Mapping[str, torch.Tensor], spec: ModelSpec
) -> Mapping[str, torch.Tensor]:
    """With stand-ins for experts' second matrices, by which stacked experts are recognised."""
    shape = (spec.local_experts, spec.hidden_size, spec.moe_ffn_hidden_size)
    seconds = {
        name.replace("linear_fc1", "linear_fc2"): torch.empty(
            shape, dtype=torch.float32, device="meta"
        )
        for name in tensors
        if ".experts.experts.linear_fc1." in name
    }
    return seconds | dict(tensors)


def quantised(recipe: Recipe) -> dict[str, Any]:
    """The fields that a shard's recipe takes over from the caller's.

    Raises:
        RecipeError: it wants scales that are not read from shards, or layers kept by the whole
            model's numbers, which a shard does not know.
    """
    check_kinds(quantisation=recipe)
    for name in ("keep_first", "keep_last", "kv_cache"):
        if getattr(recipe, name) != getattr(Recipe(), name):
            raise RecipeError(
                f"quantisation: {name} = {getattr(recipe, name)!r} is not taken over for a shard; "
                f"name the modules in exclude, and leave it out"
            )
    if recipe.scales == FROM_SOURCE:
        raise RecipeError(
            "quantisation: scales = 'source' is not read from shards; give a table of scales"
        )
    return {name: getattr(recipe, name) for name in ("quant", "exclude", "scales")}


def addresses(state_dict: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Where a state dict's tensors are: while that is the same, so is the plan."""
    return [
        (name, value.data_ptr(), value.dtype, value.shape, value.stride())
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    ]


def chunks_of(model_state_dict: object, consume: bool) -> tuple[list[dict[str, Any]], bool]:
    """The state dicts, and whether there is just one, not in a list.

    Raises:
        SourceError: it is something else, or cannot be emptied where it is to be.
    """
    several = isinstance(model_state_dict, (list, tuple))
    chunks: list[Any] = [*model_state_dict] if several else [model_state_dict]  # type: ignore[misc]
    for chunk in chunks:
        check_kinds(state_dict=chunk)
        if consume and not isinstance(chunk, MutableMapping):
            raise SourceError(
                f"consume=True empties the state dict, and a {type(chunk).__name__} cannot be "
                f"emptied; give a dict, or leave consume out"
            )
    return chunks, not several


def check_call(conversion: object, vocab_size: Any) -> None:
    """Raise RecipeError unless these can be a conversion's arguments."""
    check_kinds(trtllm_conversion_dict=conversion, tokenizer_vocab_size=vocab_size)
    if vocab_size < 1:
        raise RecipeError(f"tokenizer_vocab_size must be at least 1, found {vocab_size}")


def share_memory(tensors: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> bool:
    """True if every tensor is a view of the source of its name."""
    return all(
        tensor.untyped_storage().data_ptr() == sources[name].untyped_storage().data_ptr()
        for name, tensor in tensors.items()
    )
