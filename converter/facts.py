"""Reading single facts out of loosely typed mappings: arguments, YAML, configuration objects."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from .errors import ModelError, UnsupportedOptionError

# How sources write an activation function → the name used here.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "openai_gelu": "gelu",
    "fast_gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "squared_relu": "squared_relu",
}


def first(facts: Mapping[str, object], names: Iterable[str]) -> object | None:
    """The first fact among `names` that is given and not None."""
    return next((facts[name] for name in names if facts.get(name) is not None), None)


def as_int(facts: Mapping[str, object], name: str) -> int:
    """A fact that must be there and be a positive integer.

    Raises:
        ModelError: it is missing, or is not a positive integer.
    """
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"the model's {name} must be a positive integer, found {value!r}; "
            f"give it in a file for --spec (a line '{name}: NUMBER')"
        )
    return value


def as_bools(values: object) -> tuple[bool, ...]:
    """A sequence of truth values."""
    if not isinstance(values, Iterable):
        raise ModelError(f"expected a list of true and false, found {values!r}")
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


def layer_pattern(frequency: object, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts, from Megatron's `moe_layer_freq`.

    A number n puts experts into every n-th layer, beginning with the first; a list, or a string
    such as "[0]+[1]*3", says it for each layer.

    Raises:
        ModelError: the list does not have one entry for each layer.
    """
    if isinstance(frequency, str):
        frequency = _parse_pattern(frequency)
    if isinstance(frequency, int):
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
    except (SyntaxError, TypeError, ValueError) as error:
        raise ModelError(f"moe_layer_freq {text!r} is not a list of 0 and 1") from error


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
