"""The assets judge each other: Megatron's logits against the runtime's, through the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.cases import BY_NAME, CASES, some_tokens
from fuseport_testing.handmade import trtllm_config, write_checkpoint
from fuseport_testing.megatron_models import Run
from fuseport_testing.oracle import oracle_trtllm
from fuseport_testing.spellings import GROUPED, with_grouped_experts, with_te_norms
from fuseport_testing.trtllm_runtime import runtime_logits
from torch.distributed.checkpoint.filesystem import FileSystemReader

Runs = Callable[..., Run]
SIZES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)]
NAMES = [case.name for case in CASES]
MOE_NAMES = [case.name for case in CASES if case.experts]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def logits_through_oracle(
    run: Run, directory: Path, tp: int, pp: int, sharding: int | None = None, moe_ep: int = 1
) -> torch.Tensor:
    parallel, dim = sharding is not None, sharding or 0
    ranks = oracle_trtllm(
        run.state(), run.case, tp, pp, torch.bfloat16, run.case.vocab, parallel, dim, moe_ep
    )
    config = trtllm_config(run.case, tp, pp, parallel, dim, moe_ep)
    write_checkpoint(directory, config, ranks)
    return runtime_logits(directory, some_tokens(run.case))


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [(case.name, tp, pp) for case in CASES for tp, pp in SIZES if pp <= case.layers],
)
def test_oracle_and_runtime_give_megatrons_logits(
    name: str, tp: int, pp: int, megatron_run: Runs, tmp_path: Path
) -> None:
    run = megatron_run(name)
    assert relative_error(logits_through_oracle(run, tmp_path, tp, pp), run.logits) < 1e-5


@pytest.mark.parametrize("sharding", [0, 1])
@pytest.mark.parametrize("name", ["gpt", "llama", "gemma"])
def test_parallel_embedding(name: str, sharding: int, megatron_run: Runs, tmp_path: Path) -> None:
    run = megatron_run(name)
    result = logits_through_oracle(run, tmp_path, 2, 1, sharding)
    assert relative_error(result, run.logits) < 1e-5


@pytest.mark.parametrize("moe_ep", [2, 4])
@pytest.mark.parametrize("name", MOE_NAMES)
def test_expert_parallel(name: str, moe_ep: int, megatron_run: Runs, tmp_path: Path) -> None:
    run = megatron_run(name)
    result = logits_through_oracle(run, tmp_path, 4, 1, moe_ep=moe_ep)
    assert relative_error(result, run.logits) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_exact_in_bf16(name: str, megatron_run: Runs) -> None:
    shift = 1 if BY_NAME[name].zero_centered else 0
    for key, value in megatron_run(name).state().items():
        if key.endswith("_extra_state"):
            continue
        moved = value + shift if key.endswith("norm.weight") else value
        assert torch.equal(moved.bfloat16().float(), moved), key
        assert value.unique().numel() > min(4, value.numel() - 1), f"{key} is nearly constant"


def test_every_part_of_a_layer_matters(megatron_run: Runs, tmp_path: Path) -> None:
    """Swapping two blocks of a tensor moves the logits far beyond the tolerance."""
    run = megatron_run("qwen2_moe")
    ranks = oracle_trtllm(run.state(), run.case, 1, 1, torch.bfloat16, run.case.vocab)
    for name in list(ranks[0]):
        tensor = ranks[0][name]
        if "layers.1." not in name or tensor.shape[0] == 1:
            continue
        dim = -2 if tensor.ndim == 3 else 0
        swapped = tensor.roll(tensor.shape[dim] // 2, dim)
        directory = tmp_path / name
        write_checkpoint(directory, trtllm_config(run.case, 1, 1), [ranks[0] | {name: swapped}])
        wrong = runtime_logits(directory, some_tokens(run.case))
        assert relative_error(wrong, run.logits) > 1e-3, name


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, one) for name in ("gpt", "mixtral", "qwen2_moe") for one in BY_NAME[name].layouts],
)
def test_layouts_have_their_keys(name: str, layout: str, megatron_run: Runs) -> None:
    run = megatron_run(name)
    tracker = run.checkpoint(layout) / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3"
    if layout == "legacy":
        assert (run.iteration_dir(layout) / "mp_rank_00" / "model_optim_rng.pt").is_file()
        return
    keys = FileSystemReader(run.iteration_dir(layout)).read_metadata().state_dict_metadata
    expected = {
        "stacked": "decoder.layers.self_attention.linear_qkv.weight",
        "per_layer": "decoder.layers.1.self_attention.linear_qkv.weight",
        "singleton": "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight_w"
        if run.case.experts
        else "decoder.layers.1.mlp.linear_fc1.weight",
    }[layout]
    assert expected in keys
    assert run.common(layout)["args"] == run.args


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "gemma"])
def test_shards_make_the_same_model(name: str, megatron_run: Runs) -> None:
    whole, split, staged = (megatron_run(name, *sizes) for sizes in ((1, 1), (2, 1), (1, 2)))
    assert relative_error(split.logits, whole.logits) < 1e-5
    norm = "decoder.layers.0.input_layernorm.weight"
    assert torch.equal(staged.state(1)[norm], whole.state()[norm.replace(".0.", ".2.")])
    proj = "decoder.layers.0.self_attention.linear_proj.weight"
    halves = [split.state(rank)[proj] for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole.state()[proj])


@pytest.mark.parametrize("kind", GROUPED)
def test_other_spellings_keep_every_value(kind: str, megatron_run: Runs) -> None:
    whole = megatron_run("qwen2_moe").state()
    state = {key: value for key, value in whole.items() if "_extra_state" not in key}
    other = with_te_norms(with_grouped_experts(state, kind))
    assert not any("local_experts" in key or "input_layernorm" in key for key in other)
    # Only a norm in front of experts keeps its own name.
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in other
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in other
    sizes = [sum(value.numel() for value in tensors.values()) for tensors in (state, other)]
    assert sizes[0] == sizes[1]


def test_legacy_grouped_experts_are_views_of_expert_major_memory(megatron_run: Runs) -> None:
    state = megatron_run("mixtral").state()
    experts = "decoder.layers.0.mlp.experts."
    first = with_grouped_experts(state, "legacy")[experts + "weight1"]
    hidden = BY_NAME["mixtral"].hidden
    third = first.view(4, hidden, -1)[2].T
    assert torch.equal(third, state[experts + "local_experts.2.linear_fc1.weight"])
