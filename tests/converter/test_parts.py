"""A conversion in parts of whole layers, so that a GPU works while the next part is planned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fuseport_testing.cases import megatron_args
from fuseport_testing.small_models import random_state, small

from fuseport.converter import ModelSpec, Recipe, convert_state_dict, state
from fuseport.converter.backend import Copy, Make, copier
from fuseport.kernels.move import Move
from fuseport.kernels.repeats import Repeat

RECIPES = [
    Recipe(target="trtllm", tp_size=2, pp_size=2),
    Recipe(target="hf", quant="fp8", kv_cache="fp8"),
    Recipe(target="hf", quant="nvfp4", exclude=("lm_head", "*.layers.1.*"), keep_last=1),
]


@pytest.mark.filterwarnings("ignore:no scales of the KV cache|no static scales")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.target}-{recipe.quant}")
def test_parts_do_not_change_a_bit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(
        hidden=32, heads=4, query_groups=2, kv_channels=16, ffn=64, experts=2, moe_ffn=32, layers=4
    )
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))
    weights = random_state(case)
    whole = convert_state_dict(weights, spec, recipe)
    batches: list[int] = []

    def counting(backend: str, device: torch.device) -> Make:
        make = copier(backend, device)

        def counted(moves: Sequence[Move], repeats: Sequence[Repeat] = ()) -> Copy:
            batches.append(len(moves))
            return make(moves, repeats)

        return counted

    monkeypatch.setattr(state, "PART", 1)
    monkeypatch.setattr(state, "copier", counting)
    parts = convert_state_dict(weights, spec, recipe)
    # What stands before the layers, four layers, what stands behind them.
    assert len(batches) >= 6
    assert [list(rank) for rank in parts] == [list(rank) for rank in whole]
    for one, other in zip(parts, whole, strict=True):
        for name, tensor in one.items():
            bits = (each.reshape(-1).view(torch.uint8) for each in (tensor, other[name]))
            assert torch.equal(*bits), name
