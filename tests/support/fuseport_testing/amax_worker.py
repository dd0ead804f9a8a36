"""One rank under torchrun: quantises its shards with scales that ranks share.

    torchrun --nproc-per-node N amax_worker.py DIR

DIR/jobs.pt is a list of jobs: `tp` and `ep` sizes, a configuration's fields, a vocabulary, and the
shards of `tp` ranks. Ranks in runs of `tp` do a job together. Each rank leaves what it made of its
own shard, and how many numbers went through the group, in `result{rank}.pt`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fuseport.converter import Recipe
from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel


def main() -> None:
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    results = [work(job, rank, world) for job in torch.load(directory / "jobs.pt")]
    torch.save(results, directory / f"result{rank}.pt")
    dist.destroy_process_group()


def work(job: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    tp, numbers = job["tp"], 0
    groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, world, tp)]
    converter = DistributedTRTLLMModelWeightsConverter(
        SimpleNamespace(**job["config"]),
        "bfloat16",
        parallel=Parallel.from_groups(groups[rank // tp], ep_size=job["ep"]),
        quantisation=Recipe(**job["recipe"]),
    )
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal numbers
        numbers += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    for _ in range(2):
        numbers = 0
        with mock.patch.object(dist, "all_reduce", counted):
            converter.convert(job["shards"][rank % tp], {}, job["vocab"])
    return {"tensors": dict(converter.trtllm_model_weights), "numbers": numbers}


if __name__ == "__main__":
    main()
