"""A checkpoint on disk becomes a checkpoint for a serving engine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fuseport.kernels.move import Move

from .backend import Run, choose, default_device, run_all
from .checkpoint import (
    MANIFEST,
    FileImage,
    Writer,
    copy_assets,
    file_digest,
    keep_apart,
    publish,
    write_json,
)
from .given import Given, StoredConstants, scale_table
from .losses import Losses
from .model import ModelSpec
from .plan import Planned, batches, bind, intervals, on_meta, storage_key
from .quantise import build, on_real
from .recipe import Recipe
from .report import Report
from .sources.source import Source, open_source
from .sources.stored import Piece, Stored
from .state import check_complete, zero_row
from .stored_codes import tally, twins_of, without_unused
from .targets.table import TARGETS, te_table
from .targets.target import Target, Task, file_images

# Bytes of target tensors converted at once.
BATCH = 256 << 20

# The name of the zeros that fill a padded vocabulary, where a source tensor's name is shown.
PADDING = "(zero rows)"

Progress = Callable[[int], None]


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything about a conversion that is known before a weight is read."""

    source: Source
    spec: ModelSpec
    recipe: Recipe
    tensors: list[Planned]
    stored: Mapping[int, Stored]
    images: Mapping[int, FileImage]
    notes: tuple[str, ...] = ()

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
        return {
            self.source.embedding: dropped,
            self.source.output: output,
            PADDING: hidden,
        }


def plan_checkpoint(
    source: Path | Source,
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
    given = dataclasses.asdict(facts) if isinstance(facts, ModelSpec) else facts
    opened = (
        source
        if isinstance(source, Source)
        else open_source(source, given, recipe.family, recipe.mtp)
    )
    if isinstance(facts, ModelSpec):
        spec = facts
    else:
        spec = ModelSpec.from_facts(opened.facts, **dict(facts or {}))
    model = opened.read(opened.tensors, spec)
    target = TARGETS[recipe.target]
    target.check(spec, recipe)
    check_complete(model, spec)
    zeros = zero_row(model, spec, torch.device("cpu"))
    twin = torch.empty_like(zeros, device="meta")
    piece = Piece((0, 0), tuple(zeros.shape), zeros)
    padding = Stored(PADDING, tuple(zeros.shape), zeros.dtype, (piece,))
    task = Task(model, spec, recipe, twin, origin=opened.handed_on)
    kept, codes = twins_of(opened.stored)
    stored = {**opened.stored, **codes, storage_key(twin): padding}
    constants = StoredConstants(stored)
    scales = Given(constants, scale_table(recipe, partial(te_table, task, opened.states)))
    planned = list(build(list(target.rules(task)), recipe, on_meta, scales, kept))
    scales.check_used(recipe)
    stored = without_unused(stored, planned, kept)
    tensors, images = file_images(target, planned, recipe)
    plan = CheckpointPlan(opened, spec, recipe, tensors, stored, images, tuple(scales.notes))
    # What a target's settings cannot say is an error before anything is read.
    plan.settings()
    return plan


def convert_checkpoint(
    source: Path | CheckpointPlan,
    out: Path,
    recipe: Recipe | None = None,
    facts: Mapping[str, object] | ModelSpec | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    assets: Path | None = None,
    measure: bool = False,
    progress: Progress = lambda nbytes: None,
) -> Report:
    """Convert a checkpoint; `out` appears whole, with a manifest, or not at all.

    Args:
        source: a checkpoint's directory, or a plan.
        out: the directory to create.
        recipe, facts: as for `plan_checkpoint`, when `source` is a directory.
        backend, device: where the moves run.
        overwrite: replace `out` if it exists.
        assets: a directory from which the tokenizer's files are copied, for targets that have them.
        measure: sum the errors of quantised weights up, in the same pass.
        progress: called with the number of target bytes done since the last call.

    Raises:
        FuseportError: see `errors`; `out` is as it was.
    """
    where = default_device(device)
    run = choose(backend, where)
    plan = source
    if not isinstance(plan, CheckpointPlan):
        plan = plan_checkpoint(plan, recipe or Recipe(), facts)
    keep_apart(plan.source.origin, out)
    with publish(out, overwrite=overwrite, needed=plan.nbytes) as partial:
        if assets is not None:
            copy_assets(assets, partial, plan.target.others)
        writer = Writer(partial, plan.images)
        try:
            writer.open()
            losses = _fill(plan, writer, run, where, measure, progress)
            writer.finish()
        finally:
            writer.close()
        for name, values in plan.settings().items():
            write_json(partial / name, values)
        write_json(partial / MANIFEST, _manifest(plan, writer, losses))
    codes = tally(plan.stored)
    return Report(out, plan.nbytes, len(plan.tensors), codes=codes, **losses.summary())


def _fill(
    plan: CheckpointPlan, writer: Writer, run: Run, device: torch.device, measure: bool,
    progress: Progress,
) -> Losses:  # fmt: skip
    losses = Losses()
    for batch in batches(plan.tensors, BATCH):
        results, lost = compute(batch, plan.stored, run, device, measure)
        for planned, tensor, (counts, power) in zip(batch, results, lost, strict=True):
            writer.write(planned.rank, planned.name, tensor.cpu())
            name = f"{Path(plan.images[planned.rank].name).stem}/{planned.name}"
            losses.add(name, counts, power)
            progress(planned.nbytes)
    return losses


def compute(
    batch: list[Planned], stored: Mapping[int, Stored], run: Run, device: torch.device,
    measure: bool = False,
) -> tuple[list[torch.Tensor], list[tuple[list[int], list[float]]]]:  # fmt: skip
    """Read what a batch of planned tensors needs, and fill them on `device`.

    Returns:
        The tensors, and for each (saturated, non-finite) element counts and, if they are measured,
        (signal, noise) sums.
    """
    memory = _load((move.src for one in batch for move in one.moves), stored, device)
    results = [torch.empty_like(planned.dst, device=device) for planned in batch]
    # Where scales land: in tensors of the batch, or (an amax) in scratch memory.
    real = {storage_key(one.dst): dst for one, dst in zip(batch, results, strict=True)}
    moves = [
        [_bound(move, dst, memory, real) for move in planned.moves]
        for planned, dst in zip(batch, results, strict=True)
    ]
    every = [move for group in moves for move in group]
    counts, power = run_all(run, every, measure, device)
    sizes = [len(group) for group in moves]
    sums = [[part.sum(0).tolist() for part in each.split(sizes)] for each in (counts, power)]
    return results, list(zip(*sums, strict=True))


Memory = dict[int, list[tuple[int, torch.Tensor]]]


def _load(
    views: Iterable[torch.Tensor], stored: Mapping[int, Stored], device: torch.device
) -> Memory:
    """For each storage, its needed ranges: (first element, 1-D tensor on the device)."""
    memory: Memory = {}
    for key, spans in intervals(views).items():
        for span in spans:
            host = torch.empty(span.stop - span.start, dtype=stored[key].dtype)
            stored[key].read_flat(span.start, span.stop, host)
            memory.setdefault(key, []).append((span.start, host.to(device)))
    return memory


def _bound(move: Move, dst: torch.Tensor, memory: Memory, real: dict[int, torch.Tensor]) -> Move:
    target = bind(move.dst, dst.view(-1), 0)
    if not move.src.numel():
        return Move(target, target, 0.0)
    offset = move.src.storage_offset()
    first, flat = max(
        (one for one in memory[storage_key(move.src)] if one[0] <= offset), key=lambda one: one[0]
    )
    quant = on_real(move.quant, real, dst.device)
    return Move(target, bind(move.src, flat, first), move.shift, quant)


def _manifest(plan: CheckpointPlan, writer: Writer, losses: Losses) -> dict[str, object]:
    files = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}
        for path in sorted(writer.directory.iterdir())
    }
    return {
        "format": 1,
        "fuseport": importlib.metadata.version("fuseport"),
        "torch": torch.__version__,
        "source": {"path": plan.source.origin.name, "kind": plan.source.kind},
        "recipe": dataclasses.asdict(plan.recipe),
        "spec": dataclasses.asdict(plan.spec),
        "ignored": dict(plan.source.ignored),
        **losses.summary(),
        "codes": tally(plan.stored),
        "notes": list(plan.notes),
        "files": files,
        "tensors": writer.digests,
    }
