"""vLLM's own loaders fill its own parameters with quantised results; they say what the model says.

Needs another interpreter: CONTRIBUTING.md says how to have it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fuseport_testing.hf_models import BY_NAME, HfCase, make
from fuseport_testing.vllm_engine import SECONDS, Answers, Job, ask_vllm, need_vllm

from fuseport.converter import Recipe, convert_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS),
    pytest.mark.filterwarnings("ignore:no static scales of activations"),
]

State = dict[str, torch.Tensor]
# All parts that vLLM fuses are whole blocks of 128 × 128.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 3,
}  # fmt: skip
WIDER: dict[str, Any] = {
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256, "kv_lora_rank": 128,
    "q_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
DEEPSEEK = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def source(name: str, **said: object) -> HfCase:
    case = BY_NAME[name]
    wider = {key: size for key, size in WIDER.items() if case.options.get(key) is not None}
    return replace(case, options={**case.options, **SIZES, **wider, **said})


SOURCES = {
    "llama": source("llama"),
    "mixtral": source("mixtral"),
    "qwen3_moe": source("qwen3_moe_plain"),
    "qwen2_moe": source("qwen2_moe"),
    "gemma3": source("gemma3"),
    "nemotron": source("nemotron"),
    "deepseek": source("deepseek", **DEEPSEEK),
    "deepseek_whole_q": source("deepseek_whole_q", **DEEPSEEK),
}
GIVEN = {"*": {"input": 0.0625}}
CACHE = {"*.k_proj": {"k": 0.5}, "*.v_proj": {"v": 0.75}}
# What vLLM calls them.
SCALES = {
    "input": ("input_scale", 0.0625), "k": ("attn.k_scale", 0.5), "v": ("attn.v_scale", 0.75),
}  # fmt: skip
# What vLLM has a value of its own for, where a checkpoint says nothing of it.
OWN = re.compile(r"attn\.(q|k|v|prob)_(scale|zero_point)$")


@dataclass(frozen=True)
class Quantised:
    """A result, and which modules of vLLM stay as they are."""

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    kept: str = "never"

    @property
    def given(self) -> set[str]:
        """The kinds of scales that are given."""
        return {kind for one in self.options.get("scales", {}).values() for kind in one}

    @property
    def name(self) -> str:
        """A file's name."""
        said = [f"{k}={v}" for k, v in self.options.items() if k not in ("scales", "exclude")]
        excluded = ["exclude"] if "exclude" in self.options else []
        return "-".join([self.source, *said, *excluded, *sorted(self.given)])


EXCLUDED = ("lm_head", "*.q_proj", "*.1.mlp.down_proj")
QUANTS = ("fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4")
CASES = [
    *[Quantised(source, {"quant": quant}) for source in SOURCES for quant in QUANTS],
    *[
        Quantised(source, {"quant": quant, "scales": GIVEN})
        for source in SOURCES
        for quant in ("fp8", "nvfp4")
    ],
    *[
        Quantised("llama", {"quant": quant, "kv_cache": "fp8", "scales": CACHE})
        for quant in ("none", *QUANTS)
    ],
    *[
        Quantised("qwen3_moe", {"quant": quant, "keep_first": 1, "keep_last": 1}, r"layers\.[02]\.")
        for quant in QUANTS
    ],
    *[
        Quantised("llama", {"quant": quant, "exclude": EXCLUDED},
                  r"qkv_proj|layers\.1\.mlp\.down_proj")
        for quant in QUANTS
    ],
    *[
        Quantised(source, {"quant": quant, "profile": "compressed-tensors"})
        for source in ("llama", "mixtral", "qwen3_moe")
        for quant in ("fp8-row", "fp8-block")
    ],
    Quantised("llama", {"quant": "fp8", "profile": "compressed-tensors"}),
]  # fmt: skip

# Rows and columns that share a scale, and the relative error that a scheme keeps.
GRIDS = {"fp8-row": (1, 2**20), "fp8-block": (128, 128), "mxfp8": (1, 32), "nvfp4": (1, 16)}
BOUNDS = {"nvfp4": 0.12, "mxfp8": 0.04, "fp8": 0.04, "fp8-row": 0.04, "fp8-block": 0.04}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def is_linear(name: str, case: Quantised) -> bool:
    """Whether a parameter of vLLM's is quantised; its routers are called gate."""
    part = re.search(r"\.(\w*_proj|kv_a_proj_with_mqa|experts.*)[._]weight$", name)
    return part is not None and not re.search(case.kept, name)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative, of all elements together."""
    return float((found - reference).norm() / reference.norm())


def decoded(state: State, name: str, quant: str) -> torch.Tensor:
    """What a weight's codes and scales say by the scheme's formula, fp32 [..., out, in]."""
    codes = state[name]
    values = e2m1(codes) if quant == "nvfp4" else codes.float()
    scale = next(state[name + end] for end in ("_scale", "_scale_inv") if name + end in state)
    if quant == "fp8":
        return values * one_for_all(scale, values)
    if quant == "nvfp4":
        values = values * one_for_all(state[name + "_scale_2"], values)
    scale = torch.exp2(scale.float() - 127) if quant == "mxfp8" else scale.float()
    rows, columns = (
        torch.arange(size) // step
        for size, step in zip(values.shape[-2:], GRIDS[quant], strict=True)
    )
    return values * scale[..., rows, :][..., columns]


def one_for_all(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor's scale, or an expert's, as [..., 1, 1]; its fused parts have the same."""
    parts = scale.view(*values.shape[:-2], -1)
    assert (parts == parts[..., :1]).all()
    return parts[..., :1, None]


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even column low."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return torch.where(codes < 8, 1.0, -1.0) * E2M1[(codes & 7).long()]


@dataclass(frozen=True)
class Loaded:
    """What vLLM made of the results in a directory."""

    root: Path
    answers: Answers

    def parameters(self, name: str) -> State:
        """As vLLM's loaders leave them."""
        found: State = self.answers[name]["parameters"]
        return found

    def never_used(self, name: str) -> bool:
        """Whether vLLM only has scales of activations to drop or to overwrite them."""
        config = json.loads((self.root / name / "config.json").read_text())
        said: dict[str, object] = config.get("quantization_config", {})
        return said.get("quant_algo") == "W4A16_NVFP4"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """All results, loaded by vLLM."""
    python, root = need_vllm(), tmp_path_factory.mktemp("results")
    for name, case in SOURCES.items():
        make(case).to(torch.bfloat16).save_pretrained(root / name)
    for quantised in CASES:
        recipe = Recipe(target="hf", **quantised.options)
        convert_checkpoint(root / quantised.source, root / quantised.name, recipe)
    names = [*SOURCES, *(quantised.name for quantised in CASES)]
    jobs = [Job(name, root / name, "parameters") for name in names]
    return Loaded(root, ask_vllm(python, jobs, root / "answers"))


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_weights_are_the_models(case: Quantised, loaded: Loaded) -> None:
    plain, found = loaded.parameters(case.source), loaded.parameters(case.name)
    quant = case.options["quant"]
    quantised = {name for name in plain if found[name].dtype is not plain[name].dtype}
    assert quantised == {name for name in plain if quant != "none" and is_linear(name, case)}
    for name, weight in plain.items():
        if name in quantised:
            assert 0 < error(decoded(found, name, quant), weight.float()) < BOUNDS[quant], name
        else:
            assert torch.equal(found[name], weight), name


@every_case
def test_every_scale_is_found(case: Quantised, loaded: Loaded) -> None:
    unfilled = {name for name in loaded.answers[case.name]["unfilled"] if not OWN.search(name)}
    if loaded.never_used(case.name):
        unfilled = {name for name in unfilled if not name.endswith("input_scale")}
    assert not unfilled
    for kind in case.given:
        ending, value = SCALES[kind]
        parameters = loaded.parameters(case.name).items()
        found = [one for name, one in parameters if name.endswith(ending)]
        assert found
        assert all((one == value).all() for one in found)
