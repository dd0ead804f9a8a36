"""What a conversion will do, known before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch

from . import collector
from .arguments import check_given, check_kinds, check_used, source_path
from .checkpoint import FileImage
from .errors import RecipeError
from .fingerprint import Fingerprint, fingerprint
from .given import Given, StoredConstants, scale_table
from .model import ModelSpec
from .plan import Planned, on_meta, storage_key
from .quantise import build
from .recipe import Recipe
from .relay_source import with_codes
from .sources.source import Source, open_source
from .sources.stored import Piece, Stored
from .state import PADDING, check_complete, zero_row
from .stored_codes import Kept, twins_of, without_unused
from .targets.table import TARGETS, te_table
from .targets.target import Target, Task, file_images


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything about a conversion that is known before a weight is read."""

    source: Source
    spec: ModelSpec
    recipe: Recipe
    tensors: list[Planned]
    stored: Mapping[int, Stored]
    images: Mapping[int, FileImage]
    fingerprint: Fingerprint = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __deepcopy__(self, memo: object = None) -> CheckpointPlan:
        """Itself: a plan never changes, and its tensors are known by their storages."""
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> NoReturn:
        raise RecipeError(
            "a plan cannot be pickled; give the other process what it was made from, and call "
            "plan_checkpoint there"
        )

    @property
    def nbytes(self) -> int:
        """Size of the result's weight files."""
        return sum(image.nbytes for image in self.images.values())

    @property
    def vocab_size(self) -> int:
        """The vocabulary without padding."""
        return self.spec.vocab_size or self._rows

    @property
    def _rows(self) -> int:
        return self.source.tensors[self.source.embedding].shape[0]

    @property
    def target(self) -> Target:
        """The recipe's target."""
        return TARGETS[self.recipe.target]

    def settings(self) -> dict[str, Mapping[str, object]]:
        """The JSON files beside the weights, by name."""
        sizes: dict[str, dict[str, int]] = {image.name: {} for image in self.images.values()}
        for planned in self.tensors:
            sizes[self.images[planned.rank].name][planned.name] = planned.nbytes
        return self.target.settings(
            self.spec, self.recipe, self.vocab_size, self.source.handed_on, sizes,
            sorted({planned.unquantised for planned in self.tensors} - {""}),
        )  # fmt: skip

    def padding_rows(self) -> dict[str, int]:
        """Source tensor → elements that are dropped on purpose: training's vocabulary padding.

        A tied model's copy of the embedding on its last pipeline stage is dropped whole.
        """
        hidden = self.spec.hidden_size
        dropped = (self._rows - self.vocab_size) * hidden
        output = self._rows * hidden if self.spec.share_embeddings_and_output_weights else dropped
        return {self.source.embedding: dropped, self.source.output: output}


@collector.paused()
def plan_checkpoint(
    source: str | Path | Source,
    recipe: Recipe,
    facts: Mapping[str, object] | ModelSpec | None = None,
) -> CheckpointPlan:
    """Plan a conversion; reads the source's metadata, no weights.

    Args:
        source: a checkpoint's directory, or one that is open.
        recipe: the choice.
        facts: facts that replace the source's own, by field of `ModelSpec`; or all of them.

    Raises:
        FuseportError: the source, the facts and the recipe do not go together.
    """
    check_kinds(recipe=recipe)
    if not isinstance(facts, ModelSpec):
        check_given(facts=facts)
    opened, seen, spec = _opened(source, recipe, facts)
    model = opened.read(opened.tensors, spec)
    target = TARGETS[recipe.target]
    target.check(spec, recipe)
    check_complete(model, spec)
    opened, model, relaid = with_codes(opened, model, spec, recipe)
    zeros = zero_row(model, spec, torch.device("cpu"))
    twin = torch.empty_like(zeros, device="meta")
    piece = Piece((0, 0), tuple(zeros.shape), zeros)
    padding = Stored(PADDING, tuple(zeros.shape), zeros.dtype, (piece,))
    task = Task(model, spec, recipe, twin, origin=opened.handed_on)
    kept, codes = twins_of(opened.stored) if opened.kind == "hf" else ({}, {})
    stored = {**opened.stored, **codes, storage_key(twin): padding}
    constants = StoredConstants(stored)
    in_source = partial(te_table, task, opened.states, opened.ep_size)
    scales = Given(constants, scale_table(recipe, in_source), relaid=relaid)
    return lay_out_plan(opened, task, stored, seen, scales, kept)


def _opened(
    source: str | Path | Source, recipe: Recipe, facts: Mapping[str, object] | ModelSpec | None
) -> tuple[Source, Fingerprint, ModelSpec]:
    """The source, what its files look like before weights are read, and the model's facts."""
    given = dataclasses.asdict(facts) if isinstance(facts, ModelSpec) else facts
    if not isinstance(source, Source):
        source = open_source(source_path(source), given, recipe.family, recipe.mtp)
    seen = fingerprint(source.origin)
    if isinstance(facts, ModelSpec):
        return source, seen, facts
    own = {str(name): value for name, value in (facts or {}).items()}
    return source, seen, ModelSpec.from_facts(source.facts, **own)


def lay_out_plan(
    source: Source,
    task: Task,
    stored: Mapping[int, Stored],
    seen: Fingerprint,
    given: Given,
    kept: Kept = MappingProxyType({}),
) -> CheckpointPlan:
    """The tensors of a task, and the files that they go to.

    Raises:
        RecipeError: two target tensors of one name, or a dtype without a conversion.
        FuseportError: what a target's settings cannot say.
    """
    target = TARGETS[task.recipe.target]
    try:
        targets = list(target.rules(task))
        planned = list(build(targets, task.recipe, on_meta, given, kept))
    except ValueError as error:
        raise RecipeError(f"the source's weights cannot be converted: {error}") from error
    check_used(task.scales, targets)
    given.check_used(task.recipe)
    tensors, images = file_images(target, planned, task.recipe)
    check_unique(tensors)
    used = without_unused(stored, planned, kept)
    plan = CheckpointPlan(
        source, task.spec, task.recipe, tensors, used, images, seen, tuple(given.notes)
    )
    # What a target's settings cannot say is an error before anything is read.
    plan.settings()
    return plan


def check_unique(tensors: list[Planned]) -> None:
    """Raise RecipeError if a file would hold two tensors of one name."""
    found: set[tuple[int, str]] = set()
    for one in tensors:
        if (one.rank, one.name) in found:
            raise RecipeError(f"two target tensors are called {one.name}; correct the family table")
        found.add((one.rank, one.name))
