"""What a target is: rules, files, settings and a check of the result. `table.py` lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fuseport.kernels.move import GivenScale

from ..checkpoint import FileImage, lay_out
from ..hf_family import Family
from ..logical import Model
from ..model import ModelSpec
from ..plan import Planned
from ..recipe import Recipe
from .parts import TargetTensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """What a Hugging Face source hands on beside its weights."""

    family: Family | None = None
    config: Mapping[str, object] | None = None
    generation: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Task:
    """A model on its way to a target."""

    model: Model
    spec: ModelSpec
    recipe: Recipe
    zero_row: torch.Tensor
    scales: Mapping[str, GivenScale] | None = None
    origin: Origin = field(default_factory=Origin)


class Settings(Protocol):
    """Makes the JSON files: name → contents."""

    def __call__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        vocab_size: int,
        origin: Origin,
        tensors: Mapping[str, Mapping[str, int]],
        unquantised: Sequence[str],
    ) -> dict[str, Mapping[str, object]]:
        """`tensors`: file → tensor → its bytes; `unquantised`: linears that stay as they are."""
        ...


@dataclass(frozen=True)
class Target:
    """A layout of weights on disk.

    `files` gives the number of each tensor's file, `file_names` the names of so many files.
    `settings` makes the JSON files: a config.json and the `needed` ones; `others` are names that
    may lie beside them. `expected` gives, for each weight file of a directory whose `config.json`
    is given, tensors and shapes that must be there, and raises ValueError if the number of files
    makes no sense.
    """

    check: Callable[[ModelSpec, Recipe], None]
    rules: Callable[[Task], Iterator[TargetTensor]]
    files: Callable[[Sequence[Planned], Recipe], list[int]]
    file_names: Callable[[int], list[str]]
    metadata: Mapping[str, str]
    settings: Settings
    required: tuple[str, ...]
    expected: Callable[[Mapping[str, Any], Path, int], dict[str, Shapes]]
    needed: tuple[str, ...] = ()
    others: frozenset[str] = frozenset()


def file_images(
    target: Target, tensors: list[Planned], recipe: Recipe
) -> tuple[list[Planned], dict[int, FileImage]]:
    """The tensors, their rank replaced by their file's number, and the images of the files."""
    numbers = target.files(tensors, recipe)
    placed = [
        dataclasses.replace(planned, rank=number)
        for planned, number in zip(tensors, numbers, strict=True)
    ]
    by_file: dict[int, list[Planned]] = {}
    for planned in placed:
        by_file.setdefault(planned.rank, []).append(planned)
    names = target.file_names(len(by_file))
    images = {
        number: lay_out(names[number], by_file[number], target.metadata)
        for number in sorted(by_file)
    }
    return placed, images
