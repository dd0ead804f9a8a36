"""Count, without a GPU, what the launches of a whole model take: moves, descriptors, tiles, tables.

    python -m benchmarks.counts

Everything is planned at full size over meta tensors, so nothing is allocated. Prints JSON, a line
for each model and scheme. Bytes of tables are those of descriptors and tile tables; `seconds_plan`
is this machine's time for views, rules, moves and tables.
"""

from __future__ import annotations

import json
import time

import torch

from fuseport.converter.sources.megatron import read_model
from fuseport.converter.state import plan_memory
from fuseport.kernels.fused_copy import FusedCopy
from fuseport.kernels.move import Move

from .models import LLAMA_8B, LLAMA_70B, QWEN3_235B_EP8, given_scales, of_rank
from .work import QUANT_SCALE, Case, moves_of

META = torch.device("meta")
WHOLE = Case("llama-3-8b to tp 8", LLAMA_8B, "trtllm", 8)
DENSE = Case("llama-3-70b rank", of_rank(LLAMA_70B, 8))
MOE = Case("qwen3-235b rank", QWEN3_235B_EP8.replace(num_layers=94))
COUNTED = (
    (WHOLE, "bf16"), (WHOLE, "given"), (DENSE, "bf16"), (DENSE, "block"), (DENSE, "mx"),
    (MOE, "bf16"), (MOE, "block"),
)  # fmt: skip


def planned_moves(case: Case, scheme: str) -> tuple[int, list[Move]]:
    """(tensors of the source, the moves of a whole conversion), on meta tensors."""
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=META)
        for name, shape in case.shapes().items()
    }
    scales = given_scales(case.spec, QUANT_SCALE) if case.takes_scales(scheme) else None
    model = read_model(weights, case.spec)
    plan = plan_memory(weights, model, case.spec, case.recipe(scheme), scales)
    return len(weights), moves_of(plan)


def count(case: Case, scheme: str) -> dict[str, object]:
    """What one conversion takes."""
    begin = time.perf_counter()
    tensors, moves = planned_moves(case, scheme)
    batch = FusedCopy(moves)
    seconds = time.perf_counter() - begin
    tables = [one for launch in batch.launches for one in (launch.descriptors, launch.tile_table)]
    return {
        "case": case.name,
        "scheme": scheme,
        "tensors": tensors,
        "moves": len(moves),
        "kinds": len(batch.launches),
        "descriptors": sum(len(launch.descriptors) for launch in batch.launches),
        "tiles": sum(launch.tiles for launch in batch.launches),
        "table_bytes": sum(one.numel() * one.element_size() for one in tables),
        "data_bytes": sum(move.src.nbytes + move.dst.nbytes for move in moves),
        "seconds_plan": round(seconds, 3),
    }


def main() -> None:
    """Print a line for each model and scheme."""
    for case, scheme in COUNTED:
        print(json.dumps(count(case, scheme)), flush=True)


if __name__ == "__main__":
    main()
