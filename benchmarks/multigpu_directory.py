"""A torch_dist directory, converted by all GPUs: one process for each, which share the files out.

Part 4 of `bench_multigpu`. Every file must be that of a conversion on one GPU, byte for byte,
before a time is taken. Nothing is brought to the disk (fsync) in the timed runs: files stay in the
page cache, so that what is compared is the conversion.
"""

from __future__ import annotations

import dataclasses
import filecmp
import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.distributed_c10d import PrefixStore

from fuseport.converter import ModelSpec, Recipe
from fuseport.converter.checkpoint_plan import CheckpointPlan, plan_checkpoint
from fuseport.converter.convert import Job, carry_out
from fuseport.converter.group import Alone, Group, Ranks

from .models import random_weights, shapes
from .multigpu_cases import Record
from .multigpu_world import World

FILES = 8
_THREADS = 8


def run_directory(world: World, spec: ModelSpec, directory: Path) -> Iterator[Record]:
    """Write a model's checkpoint, convert it to each target, check, and time it."""
    source = directory / "source"
    if world.rank == 0:
        write_source(spec, source, world.device)
    world.meet()
    # A run takes seconds.
    world = dataclasses.replace(world, repeats=2)
    size = sum(file.stat().st_size for file in source.rglob("*.distcp"))
    for recipe in (
        Recipe(tp_size=FILES, use_parallel_embedding=True),
        Recipe(target="hf", quant="fp8-block", shard_size=size // FILES),
    ):
        plan = plan_checkpoint(source, recipe, spec)
        yield _converted(world, plan, size, directory)


def write_source(spec: ModelSpec, directory: Path, device: torch.device) -> None:
    """A torch_dist checkpoint of random weights, a key for each layer's tensor."""
    iteration = directory / "iter_0000001"
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    writer = FileSystemWriter(iteration, sync_files=False, thread_count=_THREADS)
    with warnings.catch_warnings():
        # torch says that it saves without a process group, which is what is wanted.
        warnings.simplefilter("ignore")
        save(random_weights(shapes(spec), device), storage_writer=writer, no_dist=True)
    torch.save({"iteration": 1}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )


def _converted(world: World, plan: CheckpointPlan, size: int, directory: Path) -> Record:
    one, many, numbers = directory / "one", directory / "many", itertools.count()
    recipe = plan.recipe
    name = f"4 directory to {recipe.target} tp {recipe.tp_size}, {recipe.quant}"

    def alone() -> None:
        shutil.rmtree(one, ignore_errors=True)
        _carry_out(world, plan, one, Alone())

    def together() -> None:
        store = PrefixStore(f"{name}, run {next(numbers)}", world.store)
        group = Ranks(store, world.rank, world.size)
        try:
            _carry_out(world, plan, many, group)
        finally:
            group.close()

    if world.rank == 0:
        shutil.rmtree(many, ignore_errors=True)
        alone()
    world.meet()
    together()
    world.meet()
    if not world.all_say(same_files(one, many)):
        return {"case": name, "right": False}
    seconds = _seconds(world, together, many)
    lonely = world.seconds_alone(alone)
    return {
        "case": name, "right": True, "milliseconds": seconds * 1e3,
        "milliseconds_alone": lonely * 1e3, "times_as_fast": lonely / seconds,
        "source_bytes": size, "result_bytes": plan.nbytes,
        "gigabytes_per_second": (size + plan.nbytes) / seconds / 1e9,
    }  # fmt: skip


def _carry_out(world: World, plan: CheckpointPlan, out: Path, group: Group) -> None:
    device = str(world.device) if world.device.type == "cpu" else "cuda"
    carry_out(plan, out, Job(device=device, group=group, sync=False))


def _seconds(world: World, run: Callable[[], None], out: Path) -> float:
    """The slowest process's time, with the result of the run before taken away first."""

    def anew() -> None:
        world.meet()
        if world.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        world.meet()

    return world.most(world.median(run, anew))


def same_files(one: Path, other: Path) -> bool:
    """Equal names, and equal bytes in each file."""
    names = sorted(file.name for file in one.iterdir())
    if names != sorted(file.name for file in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])
