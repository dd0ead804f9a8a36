"""One rank under torchrun: converts its own shard with the drop-in and saves its file.

    torchrun --nproc-per-node N dropin_worker.py DIR TP PP VOCAB

DIR holds `shard{rank}.pt` (a state dict, or a list of virtual chunks' state dicts) and `config.pt`
(the configuration's fields); each rank adds `rank{rank}.safetensors`, converted twice. Only the
rank's own shard is read: other rows and layers come from other ranks.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel


def main() -> None:
    directory, (tp, pp, vocab) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    # Every process takes part in making every group.
    stages = [dist.new_group(list(range(stage * tp, (stage + 1) * tp))) for stage in range(pp)]
    pipelines = [dist.new_group(list(range(first, tp * pp, tp))) for first in range(tp)]
    place = Parallel.from_groups(stages[rank // tp], pipelines[rank % tp])
    config = SimpleNamespace(**torch.load(directory / "config.pt"))
    converter = DistributedTRTLLMModelWeightsConverter(config, "bfloat16", parallel=place)
    shard = torch.load(directory / f"shard{rank}.pt")
    for _ in range(2):
        converter.convert(shard, {}, vocab)
    save_file(converter.trtllm_model_weights, directory / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
