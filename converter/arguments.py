"""What the public calls ask of their arguments before anything else is done.

A wrong kind of argument, such as a model in place of its state dict, would otherwise end far from
the caller, in an AttributeError that names nothing of theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch.nn.parameter import is_lazy

from fuseport.kernels.move import GivenScale

from .errors import (
    FuseportError,
    MissingTensorError,
    ModelError,
    OutputError,
    RecipeError,
    ScaleError,
    SourceError,
    UnknownTensorError,
    VerificationError,
)
from .group import Group
from .limits import Limits
from .model import ModelSpec
from .parallel import Parallel
from .recipe import Recipe
from .scales import usable
from .shards import Place
from .sources.megatron_names import IGNORED, unwrapped
from .sources.stored_fp8 import is_stored_fp8
from .targets.parts import TargetTensor
from .timings import Timings

Class = type[FuseportError]


class Expected(NamedTuple):
    """What an argument must be: its type, in words, and the error if it is something else."""

    kind: type
    words: str
    error: Class


# The one name that nearly all families have.
HUGGING_FACE = "model.embed_tokens.weight"
_STATE = Expected(Mapping, "a mapping of names to tensors, such as model.state_dict()", SourceError)
EXPECTED = {
    "state_dict": _STATE,
    "source": _STATE,
    "spec": Expected(ModelSpec, "a ModelSpec", ModelError),
    "facts": Expected(Mapping, "a mapping of names to values, such as vars(config)", ModelError),
    "recipe": Expected(Recipe, "a Recipe", RecipeError),
    "scales": Expected(Mapping, "a mapping of names to scales", ScaleError),
    "limits": Expected(Limits, "Limits", RecipeError),
    "progress": Expected(Callable, "a function of a number of bytes", RecipeError),  # type: ignore[arg-type]
    "place": Expected(Place, "a Place", RecipeError),
    "wants": Expected(Sequence, "a list of the target's ranks", RecipeError),
    "outputs": Expected(Sequence, "a list of dicts, one for each rank", RecipeError),
    "parallel": Expected(Parallel, "a Parallel", RecipeError),
    "quantisation": Expected(Recipe, "a Recipe", RecipeError),
    "trtllm_conversion_dict": Expected(Mapping, "a mapping of names to TRTLLMLayers", RecipeError),
    "tokenizer_vocab_size": Expected(Integral, "a whole number of rows", RecipeError),
    **dict.fromkeys(
        ("overwrite", "resume", "measure", "check_source", "sync", "graph", "consume"),
        Expected(bool, "True or False", RecipeError),
    ),
    "group": Expected(Group, "a Group, as fuseport.converter.group.joined gives one", RecipeError),
    "timings": Expected(Timings, "Timings", RecipeError),
    "chunks": Expected(Sequence, "a list of state dicts", RecipeError),
    "num_layers": Expected(Integral, "a whole number of layers", RecipeError),
    "nbytes": Expected(Integral, "a whole number of bytes", RecipeError),
}


def check_kinds(**arguments: object) -> None:
    """Raise the error of `EXPECTED` for the first argument that is of another kind."""
    for name, value in arguments.items():
        expected = EXPECTED[name]
        # True counts as a whole number.
        if not isinstance(value, expected.kind) or (
            type(value) is bool and expected.kind is not bool
        ):
            raise expected.error(f"{name} must be {expected.words}, found {_found(value)}")


def check_given(**arguments: object) -> None:
    """Like `check_kinds`, for arguments that may be left out."""
    check_kinds(**{name: value for name, value in arguments.items() if value is not None})


def check_run(progress: object, **options: object) -> None:
    """The options that runs over files have; `options` may be left out."""
    check_kinds(progress=progress)
    check_given(**options)


def _found(value: object) -> str:
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def path_of(name: str, value: object, error: Class) -> Path:
    """A path as the user wrote it; `~` is the home directory.

    Raises:
        FuseportError: of class `error`; it is no path.
    """
    # Path("") is the directory that the process is in: hardly what an empty variable means.
    if not isinstance(value, (str, os.PathLike)) or str(value) == "" or "\0" in str(value):
        raise error(f"{name} must be a path, as a str or Path, found {_found(value)}")
    path = Path(value)
    # Of a user who is not known, it is a name like any other.
    with suppress(RuntimeError):
        return path.expanduser()
    return path


def source_path(value: object) -> Path:
    """The directory of a source; see `path_of`."""
    return path_of("source", value, SourceError)


def out_path(value: object) -> Path:
    """The directory to make; see `path_of`."""
    return path_of("out", value, OutputError)


def result_path(value: object) -> Path:
    """The directory to verify; see `path_of`."""
    return path_of("out", value, VerificationError)


def check_state(state_dict: Mapping[str, object]) -> None:
    """See that a state dict's tensors can be read, and are on one device.

    Raises:
        SourceError: it is none, has keys that are no names, or Hugging Face's names.
        UnknownTensorError: two names differ only in what wrappers put before them.
        MissingTensorError: a tensor has no memory here.
        ModelError: it is no plain dense tensor, or on another device than the first.
    """
    check_kinds(state_dict=state_dict)
    if HUGGING_FACE in state_dict:
        raise SourceError(
            f"state_dict has Hugging Face's names ({HUGGING_FACE}), expected Megatron-Core's; save "
            f"the model, and give its directory to convert_checkpoint"
        )
    first: tuple[str, torch.device] | None = None
    names: dict[str, str] = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise SourceError(f"state_dict has the key {name!r}, expected names of tensors")
        if (other := names.setdefault(unwrapped(name), name)) is not name:
            raise UnknownTensorError(
                f"state_dict has one tensor twice, as {other} and {name}; keep one of them"
            )
        if _is_weight(value, name):
            # A few looks for each of thousands; the rest is for what they find.
            first = first or (name, value.device)
            is_plain = _address(value) and not (value.is_nested or value.is_neg())
            if not is_plain or value.device != first[1]:
                _check_readable(name, value, *first)
        elif hasattr(value, "__array__") and not isinstance(value, torch.Tensor):
            raise ModelError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")


def _is_weight(value: object, name: str) -> TypeGuard[torch.Tensor]:
    # Transformer Engine's states are tensors on the host.
    return isinstance(value, torch.Tensor) and not name.endswith("_extra_state")


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError):
        return 0


def _check_readable(name: str, tensor: torch.Tensor, first: str, here: torch.device) -> None:
    """Raise if this tensor, of a weight, has no values, or is not on the `first` one's device."""
    if is_stored_fp8(tensor) or is_ignored(name):
        return
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        raise ModelError(
            f"{name} is a {type(tensor).__name__}, {kind}, expected torch.strided; make it dense"
        )
    if not _address(tensor) and (is_lazy(tensor) or tensor.numel()):
        raise MissingTensorError(
            f"{name}, a {type(tensor).__name__} on {tensor.device}, has no values here; expected "
            f"a whole tensor in memory (of a DTensor its full_tensor(); load a model that was made "
            f"on meta)"
        )
    if tensor.is_neg():
        raise ModelError(f"{name} is a negative view of its memory; give its resolve_neg()")
    if tensor.device != here:
        raise ModelError(
            f"{name} is on {tensor.device} and {first} on {here}; expected all tensors on one "
            f"device"
        )


def is_ignored(name: str) -> bool:
    """Whether a tensor of this name carries no weight."""
    return any(piece in name for piece in IGNORED)


def check_scales(scales: Mapping[str, GivenScale] | None, state_dict: Mapping[str, object]) -> None:
    """Raise ScaleError for what is no scale, no positive number, or on another device."""
    check_given(scales=scales)
    here = next((one.device for name, one in state_dict.items() if _is_weight(one, name)), None)
    for module, scale in (scales or {}).items():
        if not isinstance(scale, GivenScale):
            raise ScaleError(
                f"scales: {module} has a {type(scale).__name__}, expected a GivenScale (of "
                f"fuseport.kernels.quant), whose quant_scale multiplies before the cast"
            )
        value: object = scale.quant_scale
        if isinstance(value, torch.Tensor) and here not in (None, value.device):
            raise ScaleError(
                f"scales: {module} has a quant_scale on {value.device}, expected one on {here}, "
                f"where the weights are, or a float"
            )
        # The value of a tensor is not looked at: it may be on a GPU, which would be waited for.
        if isinstance(value, Real):
            usable(float(value), f"scales: {module}: quant_scale")


def check_used(scales: Mapping[str, GivenScale] | None, targets: Sequence[TargetTensor]) -> None:
    """Raise ScaleError if a scale is for no module of the target."""
    used = {id(target.quant) for target in targets}
    unused = [module for module, scale in (scales or {}).items() if id(scale) not in used]
    if unused:
        raise ScaleError(
            f"scales: {unused[0]} is no module with a weight; expected the target's names, such as "
            f"transformer.layers.0.mlp.fc"
        )


def check_conversion(
    state_dict: Mapping[str, object],
    spec: ModelSpec,
    recipe: Recipe,
    scales: Mapping[str, GivenScale] | None,
) -> None:
    """The arguments that all conversions from memory have.

    Raises:
        FuseportError: one is of another kind, or the state dict's tensors cannot be read.
    """
    check_kinds(spec=spec, recipe=recipe)
    check_state(state_dict)
    check_scales(scales, state_dict)
