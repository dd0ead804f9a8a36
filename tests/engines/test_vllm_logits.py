"""vLLM's engine runs results on a CPU: the log-probabilities are transformers', or Megatron's.

Needs another interpreter: CONTRIBUTING.md says how to have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

from fuseport_testing.cases import BY_NAME as MEGATRON
from fuseport_testing.hf_models import CASES, HfCase, load, make
from fuseport_testing.megatron_models import run_workers
from fuseport_testing.vllm_engine import SECONDS, Answers, Job, ask_vllm, need_vllm

from fuseport.converter import Recipe, convert_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS)]

# vLLM's attention on a CPU takes heads of 32, 64, …; its experts take whole tiles.
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2}
WIDER = {
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256, "kv_lora_rank": 512,
    "q_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# What checkpoints of these models say, and vLLM counts on.
SAID: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "gpt_oss": {"rope_parameters": {**YARN, "truncate": False}},
}  # fmt: skip
MEGATRON_SIZES: dict[str, Any] = {
    "hidden": 256, "kv_channels": 64, "ffn": 384, "moe_ffn": 128, "shared_ffn": 256,
}  # fmt: skip
LATENT = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
FROM_MEGATRON = (
    "llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "nemotron", "gemma_plain", "deepseek",
)  # fmt: skip
# Sums in other orders give 2e-6; two rows of one q_proj that change places give 0.03.
BOUND = 1e-4
# Weights and activations in e4m3 give 0.11.
ROW_BOUND = 0.15
# A prompt, int64 [1, 12]; all vocabularies have 61 entries.
TOKENS = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
Make = Callable[[str, Path], torch.Tensor]


def wide(case: HfCase) -> HfCase:
    wider = {name: size for name, size in WIDER.items() if case.options.get(name) is not None}
    said = SAID.get(case.model_type, {})
    return dataclasses.replace(case, options={**case.options, **SIZES, **wider, **said})


HUGGING_FACE = {case.name: wide(case) for case in CASES if case.name != "square"}


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of each next token: logits [1, 12, 61] → fp32 [11, 61]."""
    return logits[0, :-1].float().log_softmax(-1)


def from_hugging_face(name: str, out: Path) -> torch.Tensor:
    source = out.with_name(f"{out.name}-source")
    make(HUGGING_FACE[name]).save_pretrained(source)
    convert_checkpoint(source, out, Recipe(target="hf", dtype="float32"))
    with torch.no_grad():
        return log_probabilities(load(out)(TOKENS).logits)


def from_megatron(name: str, out: Path) -> torch.Tensor:
    case = MEGATRON[name]
    sizes = {key: size for key, size in MEGATRON_SIZES.items() if getattr(case, key) is not None}
    latent = tuple((key, LATENT.get(key, value)) for key, value in case.latent)
    case = dataclasses.replace(case, **sizes, latent=latent)
    run = run_workers(case, 1, 1, out.with_name(f"{out.name}-run"), ("per_layer",), TOKENS)
    recipe = Recipe(target="hf", dtype="float32")
    convert_checkpoint(run.checkpoint("per_layer"), out, recipe)
    return log_probabilities(run.logits)


SOURCES: dict[str, tuple[Make, str]] = {
    **{f"hf-{name}": (from_hugging_face, name) for name in HUGGING_FACE},
    **{f"megatron-{name}": (from_megatron, name) for name in FROM_MEGATRON},
}


@dataclass(frozen=True)
class Served:
    """What vLLM answered, and what it should have."""

    answers: Answers
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Every result, run by vLLM."""
    python, root = need_vllm(), tmp_path_factory.mktemp("served")
    tokens = tuple(TOKENS[0].tolist())
    expected = {name: write(own, root / name) for name, (write, own) in SOURCES.items()}
    jobs = [Job(name, root / name, "logits", "float32", tokens) for name in expected]
    rows = Recipe(target="hf", quant="fp8-row")
    convert_checkpoint(root / "hf-llama-source", root / "fp8-row", rows)
    jobs.append(Job("fp8-row", root / "fp8-row", "logits", "bfloat16", tokens))
    return Served(ask_vllm(python, jobs, root / "answers"), expected)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative to how far the reference's log-probabilities are spread."""
    return float((found - reference).norm() / (reference - reference.mean()).norm())


@pytest.mark.parametrize("name", SOURCES)
def test_vllm_runs_it(name: str, served: Served) -> None:
    assert error(served.answers[name], served.expected[name]) < BOUND


def test_vllm_runs_scales_of_rows(served: Served) -> None:
    """The one scheme of which a CPU has kernels; activations are quantised too."""
    found, unquantised = served.answers["fp8-row"], served.expected["hf-llama"]
    assert BOUND < error(found, unquantised) < ROW_BOUND
