"""A checkpoint on disk, or a state dict in memory, becomes a published checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .arguments import check_kinds, check_run, out_path, path_of
from .backend import choose, copier, default_device, on
from .checkpoint import MANIFEST, copy_assets, write_json
from .checkpoint_plan import CheckpointPlan, plan_checkpoint
from .engine import Engine
from .errors import OutputError, RankError, RecipeError
from .fingerprint import check_unchanged
from .group import STANDSTILL, Alone, Group, shares
from .limits import PAGE, Limits
from .loads import SLACK
from .manifest import identity, losses_of, manifest
from .model import ModelSpec
from .publish import Partial, keep_apart, publish
from .recipe import Recipe
from .report import Report
from .sources.checksums import Checking, summed
from .sources.stored import close_files
from .stored_codes import tally
from .timings import Timings
from .windows import windows
from .writer import FileResult, Writer

Progress = Callable[[int], None]
Results = dict[str, FileResult]


@dataclass(frozen=True)
class Job:
    """How a plan is carried out; `sync` False leaves fsync out, for benchmarks alone."""

    backend: str = "auto"
    device: str | torch.device = "auto"
    overwrite: bool = False
    resume: bool = False
    assets: Path | None = None
    limits: Limits = field(default_factory=Limits)
    timings: Timings = field(default_factory=Timings)
    progress: Progress = lambda nbytes: None
    group: Group = field(default_factory=Alone)
    check_source: bool = True
    sync: bool = True
    measure: bool = False


def convert_checkpoint(
    source: str | Path | CheckpointPlan,
    out: str | Path,
    recipe: Recipe | None = None,
    facts: Mapping[str, object] | ModelSpec | None = None,
    *,
    backend: str = "auto",
    device: str | torch.device = "auto",
    overwrite: bool = False,
    resume: bool = False,
    assets: str | Path | None = None,
    measure: bool = False,
    limits: Limits | None = None,
    timings: Timings | None = None,
    progress: Progress = lambda nbytes: None,
    group: Group | None = None,
    check_source: bool = True,
) -> Report:
    """Convert a checkpoint; `out` appears whole, with a manifest, or not at all.

    Args:
        source: a checkpoint's directory, or a plan.
        out: the directory to create.
        recipe: as for `plan_checkpoint`, as are `facts`, when `source` is a directory.
        backend: "triton", "torch", or "auto" (Triton on a GPU).
        device: where the moves run: "cpu", "cuda", "cuda:N", or "auto".
        overwrite: replace `out` if it exists.
        resume: go on with a killed run's finished files, and keep them if this one fails.
        assets: a directory from which the tokenizer's files are copied, for targets that have them.
        measure: sum the errors of quantised weights up, in the same pass.
        limits: bounds of memory.
        timings: where busy times go.
        progress: called with the number of target bytes done since the last call.
        group: the processes that share the work; each of them makes the same call.
        check_source: look at the checksums that the source keeps of its own bytes.

    Raises:
        FuseportError: see `errors`; `out` is as it was.
    """
    check_run(progress, limits=limits, timings=timings, group=group)
    check_kinds(overwrite=overwrite, resume=resume, measure=measure, check_source=check_source)
    out = out_path(out)
    plan = _plan(source, recipe, facts)
    keep_apart(plan.source.origin, out)
    copied = None if assets is None else path_of("assets", assets, OutputError)
    job = Job(
        backend, device, overwrite, resume, copied, limits or Limits(), timings or Timings(),
        progress, group or Alone(), check_source, measure=measure,
    )  # fmt: skip
    return carry_out(plan, out, job)


def _plan(
    source: str | Path | CheckpointPlan,
    recipe: Recipe | None,
    facts: Mapping[str, object] | ModelSpec | None,
) -> CheckpointPlan:
    if not isinstance(source, CheckpointPlan):
        return plan_checkpoint(source, Recipe() if recipe is None else recipe, facts)
    if recipe is not None or facts is not None:
        raise RecipeError("a plan has its recipe and facts; give them to plan_checkpoint instead")
    return source


# Threads fill memory that is made here, and a mode is one thread's.
@torch.inference_mode(False)
@torch.no_grad()
def carry_out(plan: CheckpointPlan, out: Path, job: Job) -> Report:
    """Convert what was planned, alone or as one of several processes."""
    known = identity(plan.fingerprint, plan.spec, plan.recipe, plan.images)
    device = default_device(job.device)
    choose(job.backend, device)
    try:
        _agree(known, job.group)
        results = (_lead if job.group.rank == 0 else _follow)(plan, out, known, job)
    except BaseException as error:
        if (cause := job.group.fail(error)) is not None:
            raise cause from error
        raise
    finally:
        close_files()
    codes, losses = tally(plan.stored), losses_of(results)
    return Report(out, plan.nbytes, len(plan.tensors), codes=codes, **losses.summary())


def _agree(known: Mapping[str, object], group: Group) -> None:
    """Raise RankError if a process is about to do something else."""
    group.tell("plan", known)
    for rank in range(1, group.size):
        first, other = group.hear("plan", 0), group.hear("plan", rank)
        if first != other:
            names = ", ".join(sorted(name for name in first if first[name] != other.get(name)))
            raise RankError(
                f"rank {rank} is about to do something else than rank 0: another {names}; start "
                f"all with the same command, source and versions"
            )


def _lead(plan: CheckpointPlan, out: Path, known: Mapping[str, object], job: Job) -> Results:
    """Rank 0: makes the directory, and publishes it once all have done their part."""
    group = job.group
    with publish(
        out, known, needed=plan.nbytes, overwrite=job.overwrite, resume=job.resume,
        durable=job.sync,
    ) as directory:  # fmt: skip
        if job.assets is not None:
            copy_assets(job.assets, directory.path, plan.target.others)
        begun = {name: asdict(result) for name, result in directory.finished.items()}
        group.tell("begun", {"path": str(directory.path.absolute()), "finished": begun})
        results = _own_files(plan, directory, job)
        for rank in range(1, group.size):
            told = group.hear("done", rank, STANDSTILL)
            results |= {name: FileResult(**result) for name, result in told.items()}
        check_unchanged(plan.source.origin, plan.fingerprint)
        for name, values in plan.settings().items():
            write_json(directory.path / name, values, durable=job.sync)
        ordered = {one.name: results[one.name] for one in plan.images.values()}
        whole = manifest(plan, known, ordered, directory.path)
        write_json(directory.path / MANIFEST, whole, durable=job.sync)
    group.tell("published", {name: asdict(result) for name, result in ordered.items()})
    return ordered


def _follow(plan: CheckpointPlan, out: Path, known: Mapping[str, object], job: Job) -> Results:
    """Any other rank: fills its files, and ends when rank 0 has published all."""
    begun = job.group.hear("begun", 0)
    finished = {name: FileResult(**result) for name, result in begun["finished"].items()}
    try:
        results = _own_files(plan, Partial(Path(begun["path"]), finished), job)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    job.group.tell("done", {name: asdict(result) for name, result in results.items()})
    published = job.group.hear("published", 0)
    return {name: FileResult(**result) for name, result in published.items()}


def _own_files(plan: CheckpointPlan, directory: Partial, job: Job) -> Results:
    """Fill this process's share of the files that are not there yet."""
    images = plan.images
    todo = {n: image.nbytes for n, image in images.items() if image.name not in directory.finished}
    mine = shares(todo, job.group.size)[job.group.rank]

    group = job.group
    records = summed(plan.stored.values())[group.rank :: group.size] if job.check_source else []
    checking = Checking(records, job.timings)

    def progress(nbytes: int) -> None:
        checking.glance()
        job.progress(nbytes)
        group.advance(nbytes)

    def finished(number: int, result: FileResult) -> None:
        directory.record(images[number].name, result)

    writer = Writer(
        directory.path, images, job.timings, progress, finished if job.sync else _skip,
        sync=job.sync,
    )  # fmt: skip
    with closing(checking):
        results = _fill(plan, writer, mine, job) if mine else {}
        checking.finish()
    old = {} if group.rank else dict(directory.finished)
    return old | {images[number].name: result for number, result in results.items()}


def _skip(number: int, result: FileResult) -> None:
    """What is not on the disk is not noted."""


def _fill(
    plan: CheckpointPlan, writer: Writer, files: Collection[int], job: Job
) -> dict[int, FileResult]:
    device = default_device(job.device)
    size = min(job.limits.window(device), _whole(plan))
    engine: Engine | None = None
    with on(device):
        try:
            make = copier(job.backend, device)
            count = job.limits.slabs(device)
            engine = Engine(device, make, size, count, writer, job.timings, job.measure)
            engine.fill(windows(plan.tensors, plan.stored, size, files))
            return writer.finish(files)
        finally:
            writer.close()
            if engine is not None:
                engine.close()


def _whole(plan: CheckpointPlan) -> int:
    """Bytes that would hold everything at once: a small model needs no large slabs."""
    read = sum(stored.nbytes for stored in plan.stored.values())
    repeated = plan.nbytes * 8
    return -(-int(SLACK * (read + repeated)) // PAGE) * PAGE + (1 << 20)
