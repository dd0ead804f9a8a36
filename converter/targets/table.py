"""The targets, a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import read_json
from ..errors import RecipeError, ScaleError
from ..formats import format_of
from ..hf_family import Family, family_of
from ..model import ModelSpec
from ..plan import Planned, batches
from ..recipe import Recipe, check
from ..scales import ScaleTable
from ..te_scales import family_modules, from_te_states, of_all_ranks, unified_modules
from . import hf_check, trtllm_check
from .hf import HfRules, check_hf
from .hf_config import hf_config
from .parts import TargetTensor
from .profiles import INPUT_SCALE
from .quant_check import unified_shapes
from .quant_config import CONFIG, HF_QUANT_CONFIG, hf_quantization
from .target import Origin, Shapes, Target, Task
from .trtllm import TrtllmRules, refuse_special
from .trtllm_config import config

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"

# Files beside the weights that say how text becomes tokens; others are not copied.
ASSETS = frozenset({
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tekken.json",
})  # fmt: skip

Sizes = Mapping[str, Mapping[str, int]]
Settings = dict[str, Mapping[str, object]]


def _check_trtllm(spec: ModelSpec, recipe: Recipe) -> None:
    format_of(recipe)
    if recipe.pp_size > 1 and (recipe.keep_first or recipe.keep_last):
        raise RecipeError(
            f"keep_first and keep_last have no place in a config.json for pp_size = "
            f"{recipe.pp_size}, whose stages each number their layers from 0; leave them out"
        )
    refuse_special(spec)
    check(spec, recipe)


def _check_hf(spec: ModelSpec, recipe: Recipe) -> None:
    format_of(recipe)
    check_hf(spec, recipe)


def _trtllm_rules(task: Task) -> Iterator[TargetTensor]:
    rules = TrtllmRules(task.model, task.spec, task.recipe, task.zero_row, task.scales)
    return rules.tensors()


def _by_rank(tensors: Sequence[Planned], recipe: Recipe) -> list[int]:
    return [planned.rank for planned in tensors]


def _rank_names(count: int) -> list[str]:
    return [f"rank{rank}.safetensors" for rank in range(count)]


def _trtllm_settings(
    spec: ModelSpec,
    recipe: Recipe,
    vocab_size: int,
    origin: Origin,
    tensors: Sizes,
    unquantised: Sequence[str],
) -> Settings:
    return {CONFIG: config(spec, recipe, vocab_size, unquantised)}


def _trtllm_expected(settings: Mapping[str, Any], out: Path, count: int) -> dict[str, Shapes]:
    world = settings["mapping"]["world_size"]
    if world != count:
        raise ValueError(f"there are {count} rank files for {world} ranks")
    shapes = [
        unified_shapes(trtllm_check.expected_matrices(settings, rank), settings)
        for rank in range(world)
    ]
    return dict(zip(_rank_names(world), shapes, strict=True))


def _family(spec: ModelSpec, recipe: Recipe, origin: Origin) -> Family:
    return origin.family or family_of(spec.model_type, recipe.family)


def _hf_rules(task: Task) -> Iterator[TargetTensor]:
    if task.scales:
        raise RecipeError("target hf takes no scales yet; leave them out")
    family = _family(task.spec, task.recipe, task.origin)
    return HfRules(task.model, task.spec, task.recipe, family).tensors()


def _shards(tensors: Sequence[Planned], recipe: Recipe) -> list[int]:
    """Consecutive tensors of at most `shard_size` bytes together; a larger one comes alone."""
    shards = batches(tensors, recipe.shard_size)
    return [number for number, shard in enumerate(shards) for _ in shard]


def _shard_names(count: int) -> list[str]:
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _hf_settings(
    spec: ModelSpec,
    recipe: Recipe,
    vocab_size: int,
    origin: Origin,
    tensors: Sizes,
    unquantised: Sequence[str],
) -> Settings:
    family = _family(spec, recipe, origin)
    if spec.share_embeddings_and_output_weights:
        # Engines have an output of their own, and take it for quantised where it is not listed.
        unquantised = sorted({*unquantised, *family.module("output")})
    said = hf_quantization(recipe, unquantised, _has_input_scales(tensors))
    files: Settings = {
        CONFIG: hf_config(spec, recipe, vocab_size, family, origin.config, said.pop(CONFIG, None)),
        INDEX: {
            "metadata": {"total_size": sum(sum(one.values()) for one in tensors.values())},
            "weight_map": {name: file for file, one in tensors.items() for name in sorted(one)},
        },
    }
    files |= said
    return files if origin.generation is None else {**files, GENERATION: origin.generation}


def _has_input_scales(tensors: Sizes) -> bool:
    names = (name for one in tensors.values() for name in one)
    return any(name.rpartition(".")[2] == INPUT_SCALE for name in names)


def _hf_expected(settings: Mapping[str, Any], out: Path, count: int) -> dict[str, Shapes]:
    modelopt = out / HF_QUANT_CONFIG
    stated = read_json(modelopt) if modelopt.is_file() else {}
    names = _shard_names(count)
    return dict(hf_check.expected_by_file(settings, stated, read_json(out / INDEX), names))


def te_table(
    task: Task, states: Callable[[], Sequence[Mapping[str, object]]], ep_size: int = 1
) -> ScaleTable:
    """The scales in Transformer Engine's states, by the target's names of modules.

    `states` gives those of each tensor-parallel rank that has some; `ep_size` is the number of
    expert-parallel ranks that wrote them.

    Raises:
        ScaleError: there are none, or one cannot be used.
    """
    found = of_all_ranks([from_te_states(one, ep_size=ep_size) for one in states()])
    if not found.linears:
        raise ScaleError(
            f"the source holds no scales of Transformer Engine ({len(found.ignored)} states "
            f"without); only delayed scaling keeps them: give a file of scales"
        )
    if task.recipe.target == "trtllm":
        return found.table(unified_modules)
    return found.table(partial(family_modules, _family(task.spec, task.recipe, task.origin)))


TARGETS: dict[str, Target] = {
    "trtllm": Target(
        check=_check_trtllm,
        rules=_trtllm_rules,
        files=_by_rank,
        file_names=_rank_names,
        metadata={},
        settings=_trtllm_settings,
        required=trtllm_check.REQUIRED,
        expected=_trtllm_expected,
    ),
    "hf": Target(
        check=_check_hf,
        rules=_hf_rules,
        files=_shards,
        file_names=_shard_names,
        # transformers loads no file without it.
        metadata={"format": "pt"},
        settings=_hf_settings,
        required=hf_check.REQUIRED,
        expected=_hf_expected,
        needed=(INDEX,),
        others=frozenset({GENERATION, HF_QUANT_CONFIG, *ASSETS}),
    ),
}
