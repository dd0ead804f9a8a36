"""Checkpoints that Megatron saved: converted, verified, and run to Megatron's own logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuseport_testing.cases import BY_NAME, CASES, some_tokens
from fuseport_testing.megatron_models import Run
from fuseport_testing.trtllm_runtime import runtime_logits
from safetensors.torch import load_file

from fuseport.converter import (
    Recipe,
    convert_checkpoint,
    plan_checkpoint,
    rederive,
    verify_checkpoint,
)
from fuseport.converter.errors import RecipeError, VerificationError
from fuseport.converter.verify import account

Runs = Callable[..., Run]
LAYOUTS = [(case.name, layout) for case in CASES for layout in case.layouts]

# Megatron's tp must not exceed the query groups here.
SAVED_BY = [
    ("llama", 2, 1),
    ("llama", 1, 2),
    ("llama", 2, 2),
    ("gpt", 4, 1),
    ("gpt", 2, 2),
    ("qwen2_moe", 2, 1),
    ("qwen2_moe", 2, 2),
]


# Facts that Megatron-LM's arguments do not hold.
def facts_of(name: str) -> dict[str, object]:
    return {"model_type": name if name in ("gemma", "falcon") else None}


def convert(run: Run, layout: str, out: Path, recipe: Recipe) -> Path:
    source = run.checkpoint(layout)
    facts = facts_of(run.case.name)
    report = convert_checkpoint(source, out, recipe, facts)
    assert not report.saturated
    assert not report.nonfinite
    return source


def error(run: Run, reference: torch.Tensor, out: Path) -> float:
    logits = runtime_logits(out, some_tokens(run.case))
    return float((logits - reference).norm() / reference.norm())


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_gives_megatrons_logits(
    name: str, layout: str, megatron_run: Runs, tmp_path: Path
) -> None:
    run = megatron_run(name)
    source = convert(run, layout, tmp_path / "out", Recipe(tp_size=2))
    assert error(run, run.logits, tmp_path / "out") < 1e-5
    verify_checkpoint(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("name", "model_type", "architecture", "qwen_type"),
    [
        ("llama", "mistral", "MistralForCausalLM", None),
        ("qwen3_moe", None, "QWenForCausalLM", "qwen3_moe"),
    ],
)
def test_families_that_are_like_others(
    name: str, model_type: str | None, architecture: str, qwen_type: str | None,
    megatron_run: Runs, tmp_path: Path,
) -> None:  # fmt: skip
    run, out = megatron_run(name), tmp_path / "out"
    source = run.checkpoint("stacked")
    convert_checkpoint(source, out, Recipe(tp_size=2), {"model_type": model_type})
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config.get("qwen_type")) == (architecture, qwen_type)
    assert error(run, run.logits, out) < 1e-5
    verify_checkpoint(out, source)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_split_gives_megatrons_logits(
    name: str, tp: int, pp: int, megatron_run: Runs, tmp_path: Path
) -> None:
    run = megatron_run(name)
    recipe = Recipe(tp_size=tp, pp_size=pp, use_parallel_embedding=tp == 4)
    source = convert(run, "per_layer", tmp_path / "out", recipe)
    assert error(run, run.logits, tmp_path / "out") < 1e-5
    verify_checkpoint(tmp_path / "out", source)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp"), SAVED_BY)
def test_checkpoints_saved_by_several_ranks(
    name: str, tp: int, pp: int, megatron_run: Runs, tmp_path: Path
) -> None:
    case = BY_NAME[name]
    run = megatron_run(name, tp, pp)
    for layout in case.layouts:
        out = tmp_path / layout
        source = convert(run, layout, out, Recipe(tp_size=2))
        assert error(run, megatron_run(name).logits, out) < 1e-5
        verify_checkpoint(out, source)


def test_one_changed_byte_is_found(megatron_run: Runs, tmp_path: Path) -> None:
    run, out = megatron_run("llama"), tmp_path / "out"
    source = convert(run, "stacked", out, Recipe(tp_size=2))
    for name in ("rank1.safetensors", "config.json"):
        path = out / name
        good = path.read_bytes()
        for place in (len(good) - 1, len(good) // 2, 9):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(VerificationError, match=name.split(".")[0]):
                verify_checkpoint(out)
        path.write_bytes(good[:-1])
        with pytest.raises(VerificationError, match="bytes, expected"):
            verify_checkpoint(out)
        path.write_bytes(good)
    verify_checkpoint(out, source)


def test_another_source_is_found(megatron_run: Runs, tmp_path: Path) -> None:
    run, out = megatron_run("llama"), tmp_path / "out"
    source = convert(run, "legacy", out, Recipe(tp_size=2))
    other = tmp_path / "other"
    shutil.copytree(source, other)
    file = next(other.rglob("model_optim_rng.pt"))
    saved = torch.load(file, weights_only=False)
    saved["model"]["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] += 1
    torch.save(saved, file)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.proj\.weight\[3, 5\]"):
        verify_checkpoint(out, other)


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-row", "fp8-block", "nvfp4"])
@pytest.mark.parametrize("size", [60, 700])
def test_small_pieces_are_compared_alike(
    quant: str, size: int, megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces smaller than a row or a block, and ones that end within a head."""
    monkeypatch.setattr(rederive, "_PIECE", size)
    run, out = megatron_run("llama"), tmp_path / "out"
    scales = {"*": {"input": 0.125}} if quant == "nvfp4" else None
    source = convert(run, "legacy", out, Recipe(target="hf", quant=quant, scales=scales))
    done: list[int] = []
    verify_checkpoint(out, source, progress=done.append)
    tensors = [one for file in out.glob("*.safetensors") for one in load_file(file).values()]
    assert sum(done) == 2 * sum(one.nbytes for one in tensors)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    file = next(other.rglob("model_optim_rng.pt"))
    saved = torch.load(file, weights_only=False)
    saved["model"]["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] *= -3
    torch.save(saved, file)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        verify_checkpoint(out, other)


def test_rows_that_exceed_the_bound_are_refused(
    megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = megatron_run("llama"), tmp_path / "out"
    source = convert(run, "legacy", out, Recipe(target="hf", quant="fp8-block"))
    monkeypatch.setattr(rederive, "_TAKES", 1 << 20)
    with pytest.raises(RecipeError, match=r"proj.weight: 128 rows .* give more host_memory"):
        verify_checkpoint(out, source)


def test_accounting(megatron_run: Runs, tmp_path: Path) -> None:
    run, out = megatron_run("llama"), tmp_path / "out"
    case = run.case
    source = convert(run, "stacked", out, Recipe(tp_size=4))
    counts = verify_checkpoint(out, source).accounting
    assert counts is not None
    padding = (case.padded_vocab - case.vocab) * case.hidden
    assert counts.dropped == {
        "embedding.word_embeddings.weight": padding,
        "output_layer.weight": padding,
    }
    # Norms and the embedding are on every rank; tp is twice the KV heads, so k and v repeat too.
    norms = (2 * case.layers + 1) * case.hidden
    keys = 2 * case.layers * case.query_groups * case.kv_channels * case.hidden
    assert counts.repeated == norms + keys + case.vocab * case.hidden
    total = sum(t.numel() for t in run.state().values() if isinstance(t, torch.Tensor))
    assert counts.once + counts.repeated + 2 * padding == total


def test_source_elements_that_nothing_uses_are_an_error(megatron_run: Runs) -> None:
    plan = plan_checkpoint(megatron_run("llama").checkpoint("stacked"), Recipe())
    account(plan)
    short = dataclasses.replace(plan, tensors=plan.tensors[:-1])
    with pytest.raises(VerificationError, match="are used by no target tensor"):
        account(short)
