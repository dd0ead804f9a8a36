"""vLLM's own loaders fill its own parameters with quantised results; they say what the model says.

Needs another interpreter: CONTRIBUTING.md says how to have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
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
SOURCES = {
    "llama": HfCase("llama", "llama", SIZES),
    "mixtral": HfCase("mixtral", "mixtral", {**BY_NAME["mixtral"].options, **SIZES}),
    "qwen3_moe": HfCase(
        "qwen3_moe", "qwen3_moe",
        {**BY_NAME["qwen3_moe_plain"].options, **SIZES, "moe_intermediate_size": 128},
    ),
}  # fmt: skip
INPUT, KEY, VALUE = 0.0625, 0.5, 0.75
GIVEN = {"*": {"input": INPUT}}
CACHE = {"*.k_proj": {"k": KEY}, "*.v_proj": {"v": VALUE}}
# What vLLM computes where a checkpoint says nothing of it.
OWN = re.compile(r"\.attn\.(q|k|v|prob)_(scale|zero_point)$")


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
        Quantised("llama", {"quant": quant, "exclude": ("lm_head", "*.q_proj", "*.1.mlp.down_proj")},
                  r"qkv_proj|layers\.1\.mlp\.down_proj")
        for quant in QUANTS
    ],
    *[
        Quantised(source, {"quant": quant, "profile": "compressed-tensors"})
        for source in SOURCES
        for quant in ("fp8", "fp8-row", "fp8-block")
    ],
]  # fmt: skip

# Rows and columns that share a scale, and the relative error that a scheme keeps.
GRIDS = {"fp8-row": (1, 2**20), "fp8-block": (128, 128), "mxfp8": (1, 32), "nvfp4": (1, 16)}
BOUNDS = {"nvfp4": 0.12, "mxfp8": 0.04, "fp8": 0.04, "fp8-row": 0.04, "fp8-block": 0.04}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def is_linear(name: str, case: Quantised) -> bool:
    """Whether a parameter of vLLM's is quantised; its routers are called gate."""
    part = re.search(r"\.(qkv_proj|o_proj|gate_up_proj|down_proj|experts.*)[._]\w+$", name)
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


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All results, loaded by vLLM."""
    python, root = need_vllm(), tmp_path_factory.mktemp("results")
    for name, case in SOURCES.items():
        make(case).to(torch.bfloat16).save_pretrained(root / name)
    jobs = [Job(name, root / name, "parameters") for name in SOURCES]
    for case in CASES:
        out = root / case.name
        convert_checkpoint(root / case.source, out, Recipe(target="hf", **case.options))
        jobs.append(Job(case.name, out, "parameters"))
    return ask_vllm(python, jobs, root / "answers")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_vllm_loads_what_the_model_says(case: Quantised, loaded: Answers) -> None:
    answer, plain = loaded[case.name], loaded[case.source]["parameters"]
    found: State = answer["parameters"]
    asked = {f"{one}_scale" for one in case.given & {"k", "v"}}
    left = [n for n in answer["unfilled"] if n.rpartition(".")[2] in asked or not OWN.search(n)]
    assert not left
    quant = case.options["quant"]
    quantised = {name for name in plain if found[name].dtype is not plain[name].dtype}
    assert quantised == {name for name in plain if is_linear(name, case) and quant != "none"}
    for name, weight in plain.items():
        if name in quantised:
            assert 0 < error(decoded(found, name, quant), weight.float()) < BOUNDS[quant], name
        else:
            assert torch.equal(found[name], weight), name
    for name, value in found.items():
        assert "input_scale" not in name or value.unique().tolist() == [INPUT], name
        assert "k" not in case.given or not name.endswith("attn.k_scale") or value == KEY
        assert "v" not in case.given or not name.endswith("attn.v_scale") or value == VALUE
