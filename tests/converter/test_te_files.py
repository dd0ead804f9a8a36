"""Transformer Engine's scales in checkpoints of several ranks."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuseport_testing import te_states as te
from fuseport_testing.cases import megatron_args
from fuseport_testing.small_models import random_state, small
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from fuseport.converter import ModelSpec, Recipe, convert_checkpoint, convert_state_dict
from fuseport.converter.errors import ScaleError
from fuseport.converter.scales import ModuleScales
from fuseport.converter.sources.source import open_source
from fuseport.converter.te_scales import Linear, TeScales, from_te_states, of_all_ranks

ORDERS = ("by_kind", "by_gemm")
EXPERTS, FIRST, LAST = 4, "mlp.experts.linear_fc1", "decoder.layers.1.mlp.linear_fc2"


def expected(factor: float = 1.0) -> ModuleScales:
    """Of `te.scales`' first gemm, whose scales are 2 and 20, times a factor."""
    input_scale, weight = (float(np.float32(1) / np.float32(s * factor)) for s in (2, 20))
    return ModuleScales(weight=weight, input=input_scale)


def write_rank(root: Path, name: str, model: dict[str, Any], **facts: Any) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    args = argparse.Namespace(swiglu=True, untie_embeddings_and_output_weights=True, **facts)
    saved = {"args": args, "checkpoint_version": 3.0, "model": model}
    torch.save(saved, folder / "model_optim_rng.pt")


def scales_of(path: Path) -> TeScales:
    source = open_source(path)
    return of_all_ranks([from_te_states(one, ep_size=source.ep_size) for one in source.states()])


@pytest.mark.parametrize("form", [te.byte_tensor, te.saved])
def test_states_of_all_ranks_of_a_legacy_checkpoint(form: Any, tmp_path: Path) -> None:
    """Layers get their numbers; of two tensor-parallel ranks the larger dequant_scale counts."""
    for tp, pp in product(range(2), range(2)):
        factor = torch.tensor([1.0 + tp, 2.0 - tp, 1.0]) * (1 + pp)
        state = te.state_2(scale_fwd=te.scales()["scale_fwd"] * factor)
        model = {
            "decoder.layers.0.mlp.linear_fc2._extra_state": form(state),
            "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(2, 2),
        }
        sizes = {"num_layers": 2, "pipeline_model_parallel_size": 2}
        write_rank(tmp_path, f"mp_rank_{tp:02d}_{pp:03d}", model, **sizes)
    found = scales_of(tmp_path)
    fc2 = [Linear(layer, "mlp.linear_fc2") for layer in range(2)]
    # Of the input rank 0's scale is the larger one, of the weight rank 1's.
    assert found.linears == {fc2[0]: expected(), fc2[1]: expected(2.0)}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_experts_of_expert_ranks_in_a_legacy_checkpoint(
    order: str, grouped: bool, tmp_path: Path
) -> None:
    """Each expert rank counts its own from 0; the scales of all four differ."""
    for ep in range(2):
        scale = te.scales(2, order)["scale_fwd"] * (1 + ep)
        whole = te.state_2(2, order, scale_fwd=scale)
        states = {"experts.linear_fc1": whole}
        if not grouped:
            rows = scale.view(3, 2).T if order == "by_kind" else scale.view(2, 3)
            states = {
                f"experts.local_experts.{e}.linear_fc1": te.state_2(scale_fwd=row.clone())
                for e, row in enumerate(rows)
            }
        model: dict[str, Any] = {
            f"decoder.layers.0.mlp.{name}._extra_state": te.byte_tensor(state)
            for name, state in states.items()
        }
        model |= {
            f"decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc2.weight": torch.ones(2, 2)
            for e in range(2)
        }
        sizes = {"num_layers": 1, "num_experts": EXPERTS, "expert_model_parallel_size": 2}
        write_rank(tmp_path, f"mp_rank_00_{ep:03d}", model, **sizes)
    found = scales_of(tmp_path)
    inputs = [found.linears[Linear(0, FIRST, expert)].input for expert in range(EXPERTS)]
    assert inputs == [float(np.float32(1) / np.float32(s)) for s in (2, 3, 4, 6)]


def pieces(
    order: str, ep_size: int, name: str, form: Callable[[object], object] = te.byte_tensor
) -> dict[str, Any]:
    """What Megatron-Core writes of a grouped linear on `ep_size` ranks; inputs' scales 2, 3, …"""
    local = EXPERTS // ep_size
    whole = te.scales(EXPERTS, "by_gemm")
    found: dict[str, Any] = {}
    for rank in range(ep_size):
        own = slice(3 * rank * local, 3 * (rank + 1) * local)
        scale, history = whole["scale_fwd"][own], whole["amax_history_fwd"][:, own]
        if order == "by_kind":
            scale = scale.view(-1, 3).T.reshape(-1)
            history = history.view(16, -1, 3).mT.reshape(16, -1)
        state = te.state_2(local, scale_fwd=scale, amax_history_fwd=history)
        for number, piece in enumerate(te.split(state, local)):
            found[name.format(e=rank * local + number)] = form(piece)
    return found


NAMES = {
    "stacked": "decoder.layers.0.mlp.experts.linear_fc1._extra_state{e}",
    "singleton": "decoder.layers.0.mlp.experts.experts.{e}.linear_fc1._extra_state",
}


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_pieces_of_expert_ranks_are_joined_by_rank(order: str, ep_size: int, layout: str) -> None:
    states = pieces(order, ep_size, NAMES[layout])
    found = from_te_states(states, ep_size=ep_size).linears
    each = [found[Linear(0, FIRST, expert)] for expert in range(EXPERTS)]
    assert [one.input for one in each] == [
        float(np.float32(1) / np.float32(2 + e)) for e in range(EXPERTS)
    ]
    assert [one.weight for one in each] == [
        float(np.float32(1) / np.float32(10 * (2 + e))) for e in range(EXPERTS)
    ]


def test_a_number_of_expert_ranks_that_does_not_fit_is_named() -> None:
    with pytest.raises(ScaleError, match=r"order .* does not show"):
        from_te_states(pieces("by_gemm", 2, NAMES["stacked"]), ep_size=1)
    with pytest.raises(ScaleError, match=r"4 experts' states of 3 expert-parallel ranks"):
        from_te_states(pieces("by_gemm", 2, NAMES["stacked"]), ep_size=3)


CASE = small(hidden=16, heads=4, kv_channels=4, ffn=16, experts=EXPERTS, moe_ffn=16, rope=True)
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
EXPERT = "model.layers.0.block_sparse_moe.experts."


def linears() -> dict[str, Any]:
    """The states of a layer, as two expert ranks write them."""
    names = [f"decoder.layers.0.{name}._extra_state/shard_0_1" for name in ATTENTION]
    found: dict[str, Any] = {name: te.saved(te.state_2()) for name in names}
    for number in (1, 2):
        name = f"decoder.layers.0.mlp.experts.experts.linear_fc{number}._extra_state"
        found |= pieces("by_gemm", 2, f"{name}/shard_{{e}}_4", te.saved)
    return found


def inverse(scale: int) -> float:
    return float(np.float32(1) / np.float32(scale))


def check_experts(found: dict[str, torch.Tensor]) -> None:
    for expert, part in product(range(EXPERTS), ("w1", "w2", "w3")):
        module = f"{EXPERT}{expert}.{part}"
        assert float(found[f"{module}.input_scale"]) == inverse(2 + expert)
        assert float(found[f"{module}.weight_scale"]) == inverse(10 * (2 + expert))


def test_scales_of_expert_ranks_in_a_whole_conversion(tmp_path: Path) -> None:
    """A torch_dist checkpoint whose arguments say that two expert ranks wrote it."""
    source = tmp_path / "source"
    source.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({**random_state(CASE), **linears()}, checkpoint_id=source, no_dist=True)
    args = megatron_args(CASE, 1, 1)
    args.expert_model_parallel_size, args.moe_layer_freq = 2, [1]
    torch.save({"args": args}, source / "common.pt")
    (source / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    convert_checkpoint(source, tmp_path / "out", Recipe(target="hf", quant="fp8", scales="source"))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    check_experts(load_file(file))


def test_scales_of_a_legacy_checkpoint_in_a_whole_conversion(tmp_path: Path) -> None:
    case = small(hidden=16, heads=4, kv_channels=4, ffn=16, layers=1, rope=True)
    names = (*ATTENTION, "mlp.linear_fc1", "mlp.linear_fc2")
    states = {f"decoder.layers.0.{name}._extra_state": te.byte_tensor(te.state_2())
              for name in names}  # fmt: skip
    model = {**random_state(case), **states}
    args = megatron_args(case, 1, 1)
    folder = tmp_path / "source" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"args": args, "model": model}, folder / "model_optim_rng.pt")
    recipe = Recipe(quant="fp8", scales="source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", recipe)
    found = load_file(tmp_path / "out" / "rank0.safetensors")
    spec = ModelSpec.from_facts(vars(args))
    (in_memory,) = convert_state_dict(model, spec, recipe)
    assert found.keys() == in_memory.keys()
    for name, tensor in in_memory.items():
        one, other = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, other), name
    assert float(found["transformer.layers.0.mlp.fc.activation_scaling_factor"]) == 0.5
