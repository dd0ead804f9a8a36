"""A checkpoint on disk becomes two: one for TensorRT-LLM 1.2, one in fp8 for engines that read
Hugging Face's layout.

    python examples/convert_offline.py CHECKPOINT OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from fuseport.converter import (
    FuseportError,
    Recipe,
    convert_checkpoint,
    plan_checkpoint,
    verify_checkpoint,
)

RECIPES = {
    "trtllm": Recipe(tp_size=2),
    "hf-fp8": Recipe(target="hf", quant="fp8-block"),
}


def convert(source: Path, out: Path, recipe: Recipe) -> None:
    """Plan, say what will come, convert, and prove every bit."""
    plan = plan_checkpoint(source, recipe)
    print(f"{out}: {len(plan.tensors)} tensors, {plan.nbytes} bytes in {len(plan.images)} files")
    report = convert_checkpoint(plan, out, overwrite=True, measure=recipe.quant != "none")
    if report.snr_db is not None:
        print(f"  signal to noise {report.snr_db:.1f} dB, saturated: {dict(report.saturated)}")
    accounting = verify_checkpoint(out, source).accounting
    assert accounting is not None
    print(f"  verified: {accounting.once} source elements once, {accounting.repeated} repeated")


def main(source: str, out: str) -> None:
    """All recipes, each into a directory of its own."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        convert(Path(source), Path(out) / name, recipe)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except FuseportError as error:
        sys.exit(f"{type(error).__name__}: {error}")
