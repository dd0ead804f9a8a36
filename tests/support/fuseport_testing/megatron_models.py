"""Runs a small Megatron model on any tp × pp, and saves it in every layout that Megatron writes."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from .cases import BY_NAME, CASES, ITERATION, Case, megatron_args, some_tokens
from .forked import serve
from .megatron_build import build, megatron_on_cpu, parallel_state

__all__ = ["BY_NAME", "CASES", "LAYOUTS", "Case", "Run", "run_workers", "some_tokens"]

# What `sharded_state_dict` is told for each key layout; `legacy` is no torch_dist checkpoint.
METADATA: dict[str, dict[str, bool]] = {
    "stacked": {},
    "per_layer": {"non_homogeneous_layers": True},
    "singleton": {"singleton_local_shards": True},
}
LAYOUTS = (*METADATA, "legacy")

# Longer than any run takes; a worker that waits for a dead one is killed then.
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """What a run left behind. Ranks are Megatron's world ranks: tp runs fastest."""

    case: Case
    tp: int
    pp: int
    out_dir: Path
    layouts: tuple[str, ...]

    @cached_property
    def logits(self) -> torch.Tensor:
        """fp32 [batch, length, vocab], without the padded vocabulary. Only for pp = 1."""
        return cast(torch.Tensor, _load(self.out_dir / "logits.pt"))[..., : self.case.vocab]

    def state(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """One rank's `state_dict()`, freshly loaded, with its `_extra_state` entries."""
        return cast(dict[str, torch.Tensor], _load(self.out_dir / f"state_{rank}.pt"))

    def checkpoint(self, layout: str) -> Path:
        """The directory that holds `latest_checkpointed_iteration.txt`."""
        return self.out_dir / layout

    def iteration_dir(self, layout: str) -> Path:
        """The checkpoint of the one saved iteration."""
        return self.checkpoint(layout) / f"iter_{ITERATION:07d}"

    def common(self, layout: str) -> dict[str, Any]:
        """What a torch_dist checkpoint holds beside tensors, wherever this version keeps it.

        A `common.pt` up to Megatron-Core 0.16; in 0.19 a byte entry, `common_state/shard_0_1`.
        """
        from megatron.core import dist_checkpointing

        with megatron_on_cpu():
            common = dist_checkpointing.load_common_state_dict(str(self.iteration_dir(layout)))
        return cast(dict[str, Any], common)

    @property
    def args(self) -> Namespace:
        """The training arguments that the checkpoints carry."""
        return megatron_args(self.case, self.tp, self.pp)


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def run_workers(
    case: Case,
    tp: int,
    pp: int,
    out_dir: Path,
    layouts: tuple[str, ...] = (),
    tokens: torch.Tensor | None = None,
) -> Run:
    """Builds, runs and saves a case on tp × pp ranks.

    One rank runs in this process, more are forked. `tokens` is int64 [batch, length]; None takes
    `some_tokens`. Logits are computed where pp is 1.
    """
    run = Run(case, tp, pp, out_dir, layouts)
    tokens = some_tokens(case) if tokens is None else tokens
    out_dir.mkdir(parents=True, exist_ok=True)
    if tp * pp == 1:
        _work(0, run, tokens)
    else:
        _spawn(run, tokens)
    return run


def _spawn(run: Run, tokens: torch.Tensor) -> None:
    """Starts the ranks, and raises what a rank raised. None outlives the timeout."""
    serve()
    workers = start_processes(
        _work, (run, tokens), nprocs=run.tp * run.pp, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not workers.join(timeout=max(0.1, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{run.case.name}: workers ran longer than {TIMEOUT_SECONDS} s")
    finally:
        for process in workers.processes:
            if process.is_alive():
                process.kill()


def _work(rank: int, run: Run, tokens: torch.Tensor) -> None:
    """One rank's work, from the process group to the files."""
    # Several ranks share few cores; the models are too small for threads anyway.
    if run.tp * run.pp > 1:
        torch.set_num_threads(1)
    with megatron_on_cpu(), _groups(rank, run), torch.no_grad():
        model = build(run.case, run.tp, run.pp)
        state = model.state_dict()
        torch.save(state, run.out_dir / f"state_{rank}.pt")
        if run.pp == 1:
            logits = _forward(model, tokens)
            if rank == 0:
                torch.save(logits, run.out_dir / "logits.pt")
        for layout in run.layouts:
            _save(layout, model, run)


@contextmanager
def _groups(rank: int, run: Run) -> Iterator[None]:
    """Process groups of this run, taken down at its end whatever happens."""
    store, world = run.out_dir / "rendezvous", run.tp * run.pp
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(run.tp, run.pp)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, padded vocab], gathered from the tp ranks."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    hidden_from = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    # Layers that predict further tokens would want labels.
    with (
        mock.patch.object(model.config, "mtp_num_layers", None),
        mock.patch.object(model, "mtp_process", False),
    ):
        local = model(tokens, positions, hidden_from).float().contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local, group=group)
    return torch.cat(shards, -1)


def _save(layout: str, model: Any, run: Run) -> None:
    """Saves one layout the way Megatron-LM's `save_checkpoint` does."""
    directory = run.iteration_dir(layout)
    directory.mkdir(parents=True, exist_ok=True)
    if layout == "legacy":
        _save_legacy(directory, model, run)
    else:
        _save_torch_dist(directory, model, run, METADATA[layout])
    tracker = run.checkpoint(layout) / "latest_checkpointed_iteration.txt"
    tracker.write_text(str(ITERATION))


def _common(run: Run) -> dict[str, object]:
    return {"args": run.args, "checkpoint_version": 3.0, "iteration": ITERATION}


def _save_torch_dist(directory: Path, model: Any, run: Run, metadata: dict[str, bool]) -> None:
    from megatron.core import dist_checkpointing

    # A copy, because Megatron puts process groups into it.
    sharded = model.sharded_state_dict(metadata=dict(metadata))
    state = {**_common(run), "model": sharded, "content_metadata": metadata}
    dist_checkpointing.save(state, str(directory), ("torch_dist", 1))


def _save_legacy(directory: Path, model: Any, run: Run) -> None:
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if run.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    (directory / name).mkdir(exist_ok=True)
    state = {**_common(run), "model": model.state_dict()}
    torch.save(state, directory / name / "model_optim_rng.pt")
