"""A state dict in memory becomes a published checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fuseport.kernels.move import GivenScale

from .arguments import check_conversion, check_kinds, check_run, out_path
from .checkpoint_plan import CheckpointPlan, lay_out_plan
from .convert import Job, Progress, carry_out
from .errors import UnsupportedOptionError
from .limits import Limits
from .model import ModelSpec
from .recipe import Recipe
from .report import Report
from .sources.further import without_further
from .sources.megatron import read_model
from .sources.megatron_names import unwrapped
from .sources.source import Source
from .state import check_complete, given_in_memory, read_stored, weights, zero_row
from .targets.table import TARGETS
from .targets.target import Task
from .timings import Timings


def export_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    recipe: Recipe,
    out: str | Path,
    *,
    scales: Mapping[str, GivenScale] | None = None,
    backend: str = "auto",
    overwrite: bool = False,
    limits: Limits | None = None,
    timings: Timings | None = None,
    progress: Progress = lambda nbytes: None,
    sync: bool = True,
) -> Report:
    """Publish a whole model that is in memory as a checkpoint.

    `spec`, `recipe` and `scales` are as for `convert_state_dict`, other options as for
    `convert_checkpoint`.

    Args:
        state_dict: Megatron-Core's `model.state_dict()` of one rank (tp and pp 1), on a GPU or
            the host; left as it is.
        out: the directory to create.
        sync: False leaves fsync out, for benchmarks.

    Raises:
        FuseportError: see `errors`; `out` is as it was.
    """
    check_run(progress, limits=limits, timings=timings)
    check_kinds(overwrite=overwrite, sync=sync)
    out = out_path(out)
    plan = _plan_memory(state_dict, spec, recipe, scales)
    where = next(iter(plan.source.tensors.values())).device
    job = Job(
        backend, str(where), overwrite, limits=limits or Limits(), timings=timings or Timings(),
        progress=progress, sync=sync,
    )  # fmt: skip
    return carry_out(plan, out, job)


def _plan_memory(
    state_dict: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    recipe: Recipe,
    scales: Mapping[str, GivenScale] | None,
) -> CheckpointPlan:
    check_conversion(state_dict, spec, recipe, scales)
    if recipe.mtp == "drop":
        state_dict, spec = without_further(state_dict, spec)
    TARGETS[recipe.target].check(spec, recipe)
    if found := list(read_stored(state_dict)):
        raise UnsupportedOptionError(
            f"{found[0]} is an fp8 weight of training, which only convert_state_dict lays anew"
        )
    tensors = {unwrapped(name): tensor for name, tensor in weights(state_dict).items()}
    model = read_model(tensors, spec)
    check_complete(model, spec)
    device = next(iter(tensors.values())).device
    task = Task(model, spec, recipe, zero_row(model, spec, device), scales)
    source = Source(Path("memory"), "state_dict", tensors, {}, {}, {})
    given = given_in_memory(task, device, state_dict)
    return lay_out_plan(source, task, {}, {}, given)
