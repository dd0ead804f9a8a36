"""What each scheme does to a Megatron model's logits, beside the same scheme in fp64.

    python -m pytest -rP tests/converter/test_logit_error.py

prints the figures that docs/quantisation.md states.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from fuseport_testing.cases import WIDE, megatron_args, some_tokens
from fuseport_testing.hf_models import load
from fuseport_testing.megatron_models import Run, run_workers
from fuseport_testing.quantised_loader import stored_tensors, write_plain
from fuseport_testing.schemes_fp64 import SCHEMES
from safetensors.torch import save_file

from fuseport.converter import ModelSpec, Recipe, export_state_dict

PAGE = Path(__file__).parents[2] / "docs" / "quantisation.md"
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# An element halfway between two values goes to either, as the last bits of its scale have it: the
# weights' errors are the same then, and the logits' differ a little, up or down.
WEIGHT_SLACK, LOGIT_SLACK = 1.000_001, 1.005


@dataclass(frozen=True)
class Setting:
    """A Megatron run, and where the same model lies unquantised in the Hugging Face layout."""

    run: Run
    directory: Path

    def export(self, quant: str, out: Path, dtype: str = "bfloat16") -> Path:
        state = {k: v for k, v in self.run.state().items() if isinstance(v, torch.Tensor)}
        spec = ModelSpec.from_facts(vars(megatron_args(WIDE, 1, 1)))
        export_state_dict(state, spec, Recipe(target="hf", quant=quant, dtype=dtype), out)
        return out

    def error(self, directory: Path) -> float:
        """Of the logits of the fp32 model in a directory: ‖found - Megatron's‖ / ‖Megatron's‖."""
        with torch.no_grad():
            found = load(directory)(tokens()).logits.double()
        own = self.run.logits.double()
        return float((found - own).norm() / own.norm())

    def weight_error(self, directory: Path) -> float:
        """The same of all weights."""
        own, plain = stored_tensors(directory), stored_tensors(self.directory)
        noise = sum(float((own[n].double() - plain[n].double()).square().sum()) for n in plain)
        return math.sqrt(noise / sum(float(one.double().square().sum()) for one in plain.values()))

    def in_fp64(self, quant: str, out: Path) -> Path:
        """The model with its linears quantised by the reference, and rounded to fp32 at last."""
        out.mkdir()
        (out / "config.json").write_text((self.directory / "config.json").read_text())
        weights = stored_tensors(self.directory)
        for layer in range(WIDE.layers):
            for group in FUSED:
                names = [f"model.layers.{layer}.{part}.weight" for part in group]
                found = SCHEMES[quant]([weights[name].double().numpy() for name in names])
                weights |= {
                    name: torch.from_numpy(one).float()
                    for name, one in zip(names, found, strict=True)
                }
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        return out


def tokens() -> torch.Tensor:
    return some_tokens(WIDE, batch=4, length=24)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("wide")
    made = Setting(run_workers(WIDE, 1, 1, root / "run", (), tokens()), root / "plain")
    made.export("none", made.directory, "float32")
    return made


def stated() -> dict[str, tuple[float, float]]:
    """The page's figures: scheme → (exported, in fp64)."""
    rows = re.findall(r"\| `(\S+)` \| (0\.\d{4}) \| (0\.\d{4}) \|", PAGE.read_text())
    return {quant: (float(own), float(other)) for quant, own, other in rows}


def test_unquantised_the_logits_are_megatrons(setting: Setting) -> None:
    assert setting.error(setting.directory) < 1e-5


@pytest.mark.filterwarnings("ignore:no static scales of activations")
@pytest.mark.parametrize("quant", SCHEMES)
def test_no_scheme_does_worse_than_in_fp64(quant: str, setting: Setting, tmp_path: Path) -> None:
    plain = write_plain(setting.export(quant, tmp_path / "out"), tmp_path / "plain")
    in_fp64 = setting.in_fp64(quant, tmp_path / "fp64")
    assert setting.weight_error(plain) <= setting.weight_error(in_fp64) * WEIGHT_SLACK
    own, reference = setting.error(plain), setting.error(in_fp64)
    print(f"| `{quant}` | {own:.4f} | {reference:.4f} |")
    assert own <= reference * LOGIT_SLACK
    # Sums in other orders move the last digits.
    assert stated()[quant] == pytest.approx((own, reference), rel=0.02)


def test_the_page_states_every_scheme() -> None:
    assert stated().keys() == SCHEMES.keys()
