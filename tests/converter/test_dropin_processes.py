"""The drop-in under torchrun, over gloo: each rank converts the shard it has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fuseport_testing
import pytest
import torch
from fuseport_testing.cases import BY_NAME, Case, megatron_args, some_tokens
from fuseport_testing.forked import torchrun
from fuseport_testing.handmade import trtllm_config
from fuseport_testing.megatron_models import Run, run_workers
from fuseport_testing.megatron_reference import shard_of, stage_of
from fuseport_testing.trtllm_runtime import runtime_logits

Runs = Callable[..., Run]
WORKER = Path(fuseport_testing.__path__[0]) / "dropin_worker.py"
# 101 is prime, and Megatron pads it to 104.
ODD = {name: replace(BY_NAME[name], vocab=101, padded_vocab=104) for name in ("llama", "gpt")}


def convert_in_processes(
    state: dict[str, torch.Tensor], case: Case, tp: int, pp: int, out: Path, chunks: int = 0
) -> None:
    """Split the whole model as Megatron would (rows of linear_qkv evenly), and run torchrun."""
    for rank in range(tp * pp):
        # Chunks go round the ranks: chunk c of rank r is stage c · pp + r of a longer pipeline.
        held = [stage_of(state, case, pp * chunks, c * pp + rank // tp) for c in range(chunks)]
        held = held or [stage_of(state, case, pp, rank // tp)]
        shards = [shard_of(one, case, tp, rank % tp) for one in held]
        torch.save(shards if chunks else shards[0], out / f"shard{rank}.pt")
    facts = vars(megatron_args(case, 1, 1))
    plain = {k: v for k, v in facts.items() if isinstance(v, int | str | float | None)}
    # A TransformerConfig has these two where Megatron-LM's arguments have others.
    plain |= {"gated_linear_unit": case.gated, "num_query_groups": case.query_groups}
    plain |= {"moe_layer_freq": facts["moe_layer_freq"]}
    torch.save(plain, out / "config.pt")
    words = (str(WORKER), str(out), str(tp), str(pp), str(case.vocab))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = torchrun(tp * pp, *words, environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "config.json").write_text(json.dumps(trtllm_config(case, tp, pp, True)))


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("llama", 2, 1),
        ("llama", 4, 1),
        ("llama", 2, 2),
        ("gpt", 4, 1),
        ("gpt", 2, 2),
    ],
)
def test_shards_with_an_odd_vocabulary_and_few_kv_heads(
    name: str, tp: int, pp: int, tmp_path: Path
) -> None:
    case = ODD[name]
    run = run_workers(case, 1, 1, tmp_path / "megatron")
    state = {k: v for k, v in run.state().items() if isinstance(v, torch.Tensor)}
    convert_in_processes(state, case, tp, pp, tmp_path)
    logits = runtime_logits(tmp_path, some_tokens(case))
    assert float((logits - run.logits).norm() / run.logits.norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "layers", "tp", "pp", "chunks"),
    [("llama", 4, 1, 2, 2), ("gpt", 8, 2, 2, 2), ("mixtral", 6, 1, 3, 2)],
)
def test_virtual_chunks(
    name: str, layers: int, tp: int, pp: int, chunks: int, tmp_path: Path
) -> None:
    """Layers that Megatron deals out in turn end up in consecutive stages."""
    moe = (0, 1) * (layers // 2) if BY_NAME[name].experts else None
    case = replace(BY_NAME[name], layers=layers, moe_layers=moe)
    run = run_workers(case, 1, 1, tmp_path / "megatron")
    state = {k: v for k, v in run.state().items() if isinstance(v, torch.Tensor)}
    convert_in_processes(state, case, tp, pp, tmp_path, chunks)
    logits = runtime_logits(tmp_path, some_tokens(case))
    assert float((logits - run.logits).norm() / run.logits.norm()) < 1e-5
