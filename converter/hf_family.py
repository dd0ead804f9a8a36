"""Architectures as Hugging Face names them: a table each, in `families/` or in a user's file.

The same table drives both ways: a source looks a part's tensor up by its names, a target writes
the first of them. docs/adding-an-architecture.md says what a table holds. A registry of classes
was turned down: it would take code in the package to add an architecture.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

import yaml

from .errors import RecipeError

if TYPE_CHECKING:
    from importlib.abc import Traversable

# A packaged family's file is its model_type with this behind it.
SUFFIX = ".yaml"

# Part → the group of its weight: what engines fuse it into; `{parent}` is its module's parent.
GROUPS = {
    "q": "{parent}.qkv_proj",
    "k": "{parent}.qkv_proj",
    "v": "{parent}.qkv_proj",
    "gate": "{parent}.gate_up_proj",
    "up": "{parent}.gate_up_proj",
    "expert.gate": "{parent}.gate_up_proj",
    "expert.up": "{parent}.gate_up_proj",
    "shared.gate": "{parent}.gate_up_proj",
    "shared.up": "{parent}.gate_up_proj",
    # vLLM and SGLang fuse the two projections that read the layer's input.
    "q_down": "{parent}.fused_qkv_a_proj",
    "kv_down": "{parent}.fused_qkv_a_proj",
    **dict.fromkeys(
        ("output", "out", "down", "expert.down", "shared.down", "q_up", "kv_up"), "{module}"
    ),
}
MODULES = (
    *GROUPS, "embedding", "final_norm", "input_norm", "mlp_norm", "attention_out_norm",
    "mlp_out_norm", "q_norm", "k_norm", "q_down_norm", "kv_down_norm", "router", "shared_gate",
    "further.token_norm", "further.hidden_norm", "further.join", "further.norm",
    "further.embedding", "further.output",
)  # fmt: skip
TENSORS = (
    "router_bias", "sinks", "experts.gate_up", "experts.gate_up_bias", "experts.down",
    "experts.down_bias",
)  # fmt: skip
NEEDED = ("model_type", "architecture", "modules", "config")
TABLES = ("modules", "tensors", "config", "facts", "defaults", "written")
OTHERS = (
    "model_type", "architecture", "unified", "special", "zero_centred_norms",
    "alternating_experts", "drops_extra_layers", "like",
)  # fmt: skip

Table = Mapping[str, object]
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    `unified` is the family of TensorRT-LLM's unified checkpoint that it becomes, None if there is
    none. `config` maps a fact to its keys in config.json, `facts` are fixed ones, `defaults` stand
    for keys that config.json leaves out, `written` goes into a config.json made from facts.
    `special` names options that all of its models have and no fact says. `drops_extra_layers` is
    the key with the number of layers behind the last one, dropped unless the recipe keeps them.
    """

    model_type: str
    architecture: str
    modules: Names
    config: Names
    unified: str | None = None
    tensors: Names = field(default_factory=dict)
    facts: Table = field(default_factory=dict)
    defaults: Table = field(default_factory=dict)
    written: Table = field(default_factory=dict)
    special: tuple[str, ...] = ()
    zero_centred_norms: bool = False
    alternating_experts: bool = False
    drops_extra_layers: str | None = None

    @property
    def norm_shift(self) -> float:
        """What is added to a stored norm weight to get the true one."""
        return 1.0 if self.zero_centred_norms else 0.0

    def module(self, part: str, layer: int | None = 0, expert: int = 0) -> tuple[str, ...]:
        """The names of a part's module; none if the family has no such part.

        Without a layer they are `in_layer`'s.
        """
        return _filled(self.modules.get(part, ()), layer, expert)

    def names(
        self, part: str, kind: str = "weight", layer: int | None = 0, expert: int = 0
    ) -> tuple[str, ...]:
        """The names of a part's tensor, the one that is written first; `layer` as for `module`."""
        modules = self.module(part, layer, expert)
        return tuple(f"{module}.{kind}" for module in modules) or _filled(
            self.tensors.get(part, ()), layer, expert
        )

    def group(self, part: str, module: str) -> str:
        """What engines fuse a part's weight into, with its module's name; "": never quantised."""
        if part not in GROUPS:
            return ""
        return GROUPS[part].format(module=module, parent=module.rpartition(".")[0])


def _filled(names: tuple[str, ...], layer: int | None, expert: int) -> tuple[str, ...]:
    e = str(expert)
    found = [name.replace("{e}", e) for name in names]
    return tuple(found if layer is None else [in_layer(name, layer) for name in found])


def in_layer(name: str, layer: int) -> str:
    """A name of a table with its layer's number."""
    return name.replace("{i}", str(layer))


def packaged() -> dict[str, Family]:
    """model_type → family, of the tables in the package."""
    return {name: _packaged_family(name) for name in packaged_names()}


@functools.cache
def packaged_names() -> tuple[str, ...]:
    """Every packaged family's model_type, which is its file's name too."""
    files = sorted(PurePath(file.name) for file in _folder().iterdir())
    return tuple(file.stem for file in files if file.suffix == SUFFIX)


@functools.cache
def _packaged_family(name: str) -> Family:
    return make_family(_packaged_table(name), name)


@functools.cache
def _packaged_table(name: str) -> Table:
    """One file's contents; reading all of them takes longer than planning a model."""
    text = (_folder() / f"{name}{SUFFIX}").read_text()
    table: Table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


def _folder() -> Traversable:
    return importlib.resources.files(f"{__package__}.families")


def make_family(table: Table, where: str) -> Family:
    """A family from the contents of its table; `like` starts from a packaged one.

    Raises:
        RecipeError: a part or a key is not known, or one is missing.
    """
    try:
        if not isinstance(table, Mapping):
            raise TypeError(f"{table!r} is no table")
        # The manifest holds it.
        json.dumps(table)
        merged = _inherited(table, where)
        missing = [name for name in NEEDED if not merged.get(name)]
        if missing:
            raise RecipeError(f"the family {where} lacks {', '.join(missing)}")
        _check_names(merged, where)
        values = dict(merged)
        for name in ("modules", "tensors", "config"):
            values[name] = {part: _names(one) for part, one in _table(merged, name, where).items()}
        values["special"] = _names(merged.get("special") or ())
        return Family(**values)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"the family {where} makes no sense: {error}; see docs/adding-an-architecture.md"
        ) from error


def _names(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is neither a name nor a list of names")
    return tuple(names)


def _table(merged: Table, name: str, where: str) -> Mapping[str, object]:
    table = merged.get(name) or {}
    if not isinstance(table, Mapping):
        raise RecipeError(f"the family {where}: {name} must be a table of 'name: value' lines")
    return table


def _inherited(table: Table, where: str) -> dict[str, object]:
    """The table over the one that it is like; null takes a line away."""
    unknown = [name for name in table if name not in (*TABLES, *OTHERS)]
    if unknown:
        raise RecipeError(
            f"the family {where}: {unknown[0]!r} is none of {', '.join((*OTHERS, *TABLES))}"
        )
    parent = table.get("like")
    if parent is None:
        return {name: value for name, value in table.items() if name != "like"}
    known = packaged_names()
    if parent not in known:
        raise RecipeError(f"the family {where} is like {parent!r}; known: {', '.join(known)}")
    merged = _inherited(_packaged_table(str(parent)), str(parent))
    for name in TABLES:
        # A default may be null itself.
        both = {**_table(merged, name, where), **_table(table, name, where)}
        keep = name in ("defaults", "written")
        merged[name] = {key: value for key, value in both.items() if keep or value is not None}
    rest = {name: value for name, value in table.items() if name not in (*TABLES, "like")}
    return merged | rest


def _check_names(merged: Table, where: str) -> None:
    for name, known in (("modules", MODULES), ("tensors", TENSORS)):
        for part in _table(merged, name, where):
            if part not in known:
                raise RecipeError(
                    f"the family {where}: {name} has {part!r}, which is none of {', '.join(known)}"
                )


def family_of(model_type: str, own: Table | None) -> Family:
    """The user's family if there is one, else the packaged one of that name.

    Raises:
        RecipeError: there is none.
    """
    if own is not None:
        return make_family(own, str(own.get("model_type")))
    if model_type not in packaged_names():
        raise RecipeError(
            f"no table for model_type {model_type!r} in the Hugging Face layout; known: "
            f"{', '.join(packaged_names())}; give one as family (--family FILE, see "
            f"docs/adding-an-architecture.md), or another as the fact model_type (--fact "
            f"model_type=NAME)"
        )
    return _packaged_family(model_type)
