"""Reading single facts out of loosely typed mappings: arguments, YAML, configuration objects."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .errors import ModelError, UnsupportedOptionError
from .fact_names import ACTIVATIONS, NOT_FROM_MEGATRON, ONLY, REFUSED


@dataclass(frozen=True)
class Kind:
    """What a fact may be: in words, and as a test."""

    words: str
    fits: Callable[[object], bool]

    def check(self, name: str, value: object) -> None:
        """Raise ModelError, naming the fact, unless `value` fits."""
        if not self.fits(value):
            raise ModelError(
                f"the model's {name} must be {self.words}, found "
                f"{'nothing' if value is None else reprlib.repr(value)}; "
                f"give it as the fact {name} (--fact {name}=VALUE, or a line '{name}: VALUE' of a "
                f"--spec file)"
            )


def plain(value: object) -> object:
    """The number, or the list, that numpy or torch hold; any other value as it is."""
    is_theirs = getattr(value, "ndim", None) in (0, 1) and not getattr(value, "is_meta", False)
    return value.tolist() if is_theirs else value  # type: ignore[attr-defined]


def make_plain(options: Any) -> None:
    """Set the fields of a frozen dataclass to what `plain` makes of them."""
    for one in dataclasses.fields(options):
        object.__setattr__(options, one.name, plain(getattr(options, one.name)))


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers in a range; the upper end keeps a wrong fact from filling the memory."""
    words = f"a whole number from {least} to {most}"
    return Kind(words, lambda value: type(value) is int and least <= value <= most)


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of Python or of numpy."""
    return isinstance(value, Integral)


def one_of(names: Iterable[str]) -> Kind:
    """Some words."""
    known = tuple(names)
    return Kind(f"one of {', '.join(known)}", lambda value: value in known)


def optional(kind: Kind) -> Kind:
    """Like `kind`, or None."""
    return Kind(f"{kind.words} (or left out)", lambda value: value is None or kind.fits(value))


def tuple_of(item: type, words: str) -> Kind:
    """A tuple, perhaps empty, of one type."""
    return Kind(
        words,
        lambda value: isinstance(value, tuple) and all(isinstance(one, item) for one in value),
    )


SIZE = whole(1)
SIZE_OR_NONE = whole(0)
LAYERS = whole(1, 100_000)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
POSITIVE = Kind(
    "a positive number",
    lambda value: type(value) in (int, float) and 0 < value < math.inf,  # type: ignore[operator]
)


def first(facts: Mapping[str, object], names: Iterable[str]) -> object | None:
    """The first fact among `names` that is given and not None."""
    return next((facts[name] for name in names if facts.get(name) is not None), None)


def need(facts: Mapping[str, object], name: str, kind: Kind) -> int:
    """A size that must be there.

    Raises:
        ModelError: it is missing, or does not fit.
    """
    value = facts.get(name)
    kind.check(name, value)
    assert isinstance(value, int)
    return value


def loose(kind: Kind, value: object) -> object:
    """A value as `kind` wants it, where YAML or arguments write it otherwise; else as it is.

    YAML reads 1e-5, without a point, as text; arguments have 0 and 1 for false and true.
    """
    if kind is POSITIVE and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return bool(value) if kind is FLAG and value in (0, 1) else value


def refuse(facts: Mapping[str, object]) -> None:
    """Raise UnsupportedOptionError if an option is set that no rule handles."""
    family = facts.get("model_type")
    if isinstance(family, str) and family in NOT_FROM_MEGATRON:
        raise UnsupportedOptionError(
            f"model_type = {family!r} has {NOT_FROM_MEGATRON[family]}, which Megatron-Core's "
            f"layers do not have; convert it from its Hugging Face checkpoint"
        )
    for option, meaning in REFUSED.items():
        if facts.get(option):
            raise UnsupportedOptionError(
                f"the model sets {option}={reprlib.repr(facts[option])} ({meaning}), which "
                f"fuseport does not convert; export a model without it"
            )
    for option, (usual, meaning) in ONLY.items():
        if facts.get(option) not in (None, usual):
            raise UnsupportedOptionError(
                f"the model sets {option}={reprlib.repr(facts[option])} ({meaning}); fuseport "
                f"converts {usual!r} only"
            )


def check_names(names: Iterable[str], known: Mapping[str, Iterable[str]]) -> None:
    """Raise ModelError for a name that no fact has.

    Args:
        names: as the user wrote them.
        known: fact → other names of it, for the hint.
    """
    for name in names:
        if name not in known:
            same = [fact for fact, others in known.items() if name in others]
            close = same or difflib.get_close_matches(str(name), known, n=3)
            every = ", ".join(fact for fact in known if fact not in REFUSED)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {every}"
            raise ModelError(
                f"{reprlib.repr(name)} is not the name of a model fact (--fact, --spec); {hint}"
            )


def flag(facts: Mapping[str, object], names: Iterable[str]) -> bool | None:
    """The first of these flags that is given; None if none is.

    Raises:
        ModelError: it is neither true nor false.
    """
    for name in names:
        if facts.get(name) is not None:
            value = loose(FLAG, facts[name])
            FLAG.check(name, value)
            return bool(value)
    return None


def as_bools(values: object) -> tuple[bool, ...]:
    """A sequence of truth values, one for each layer."""
    if not isinstance(values, (list, tuple)) or any(value not in (0, 1) for value in values):
        raise ModelError(
            f"which layers have experts (moe_layer_freq, moe_layers) must be a list of 0 and 1, "
            f"found {reprlib.repr(values)}"
        )
    return tuple(bool(value) for value in values)


def activation_name(facts: Mapping[str, object]) -> str:
    """The activation function's name; Megatron's own default is gelu.

    Understands a function, `torch.nn.functional.silu`, a run config's `{_target_: …}`, and the
    flags of Megatron-LM's arguments (`swiglu`, `squared_relu`, `quick_geglu`).

    Raises:
        UnsupportedOptionError: the function is none of `ACTIVATIONS`.
    """
    given = facts.get("activation_func")
    if given is None:
        flags = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}
        return next((name for flag, name in flags.items() if facts.get(flag)), "gelu")
    if isinstance(given, Mapping):
        given = given.get("_target_", given)
    name = getattr(given, "__name__", str(given)).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise UnsupportedOptionError(
            f"activation_func {name!r} is not known; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def infer_model_type(facts: Mapping[str, object]) -> str:
    """The family whose target names and config a model takes, when nobody said it."""
    if facts.get("kv_lora_rank"):
        return "deepseek_v3"
    if facts.get("num_moe_experts"):
        shared = facts.get("moe_shared_expert_intermediate_size")
        return "qwen2_moe" if shared else "qwen3_moe" if facts.get("qk_layernorm") else "mixtral"
    if facts.get("normalization", "LayerNorm") == "LayerNorm":
        return "nemotron" if facts.get("activation_func") == "squared_relu" else "gpt"
    if facts.get("blocks"):
        return "nemotron_nas"
    if facts.get("qk_layernorm"):
        return "qwen3"
    if facts.get("add_qkv_bias"):
        return "qwen2"
    return "gemma" if facts.get("activation_func") == "gelu" else "llama"


def layer_pattern(frequency: object, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts, from Megatron's `moe_layer_freq`.

    A number n puts experts into every n-th layer, beginning with the first; a list, or a string
    such as "[0]+[1]*3", says it for each layer.

    Raises:
        ModelError: the list does not have one entry for each layer.
    """
    if isinstance(frequency, str):
        frequency = _parse_pattern(frequency)
    if isinstance(frequency, int) and not isinstance(frequency, bool):
        whole(1).check("moe_layer_freq", frequency)
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    pattern = as_bools(frequency)
    if len(pattern) != num_layers:
        raise ModelError(
            f"moe_layer_freq has {len(pattern)} entries for {num_layers} layers; expected one each"
        )
    return pattern


def _parse_pattern(text: str) -> object:
    """Evaluate sums and products of lists of integers, and nothing else."""
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError) as error:
        raise ModelError(
            f"moe_layer_freq {reprlib.repr(text)} is not a list of 0 and 1; write it like "
            f"'[0]+[1]*3'"
        ) from error


def _evaluate(node: ast.expr) -> object:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add):
            return left + right  # type: ignore[operator]
        return _repeat(left, right)
    return ast.literal_eval(node)


def _repeat(pattern: object, times: object) -> object:
    # A crafted "[1]*10**9" must not take all memory.
    if not isinstance(pattern, list) or not isinstance(times, int) or not 0 <= times <= 10_000:
        raise ValueError("only a list times a small number")
    return pattern * times
