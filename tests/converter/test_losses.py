"""What a conversion says about what it lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseport_testing.megatron_models import Run
from safetensors.torch import load_file
from typer.testing import CliRunner

from fuseport.converter import Recipe, convert_checkpoint
from fuseport.converter.cli import app

Runs = Callable[..., Run]


def by_hand(source: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Tensor → Σx² and Σ(x − dequantised)² in fp64, of a result in fp32 and one in fp8-row."""
    plain, narrow = (load_file(path / "model-00001-of-00001.safetensors") for path in (source, out))
    sums = {}
    for name, codes in narrow.items():
        scale = narrow.get(name.replace(".weight", ".weight_scale"))
        if scale is not None and codes.dtype is torch.float8_e4m3fn:
            exact = plain[name].double().numpy()
            error = exact - codes.float().double().numpy() * scale.double().numpy()
            sums[name] = float(np.square(exact).sum()), float(np.square(error).sum())
    return sums


def test_errors_are_those_of_the_result(megatron_run: Runs, tmp_path: Path) -> None:
    source = megatron_run("llama").checkpoint("per_layer")
    plain = Recipe(target="hf", dtype="float32")
    convert_checkpoint(source, tmp_path / "plain", plain)
    recipe = Recipe(target="hf", quant="fp8-row")
    report = convert_checkpoint(source, tmp_path / "out", recipe, measure=True)
    sums = by_hand(tmp_path / "plain", tmp_path / "out")
    prefix = "model-00001-of-00001/"
    errors = report.relative_errors
    assert errors.keys() == {prefix + name for name in sums}
    for name, (signal, noise) in sums.items():
        assert errors[prefix + name] == pytest.approx(math.sqrt(noise / signal), rel=1e-4)
    signal, noise = (sum(one[n] for one in sums.values()) for n in (0, 1))
    assert report.snr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    # Three bits of mantissa: an error of about 2.6 %.
    assert 30 < 10 * math.log10(signal / noise) < 34
    manifest = json.loads((tmp_path / "out" / "fuseport-manifest.json").read_text())
    assert manifest["relative_errors"] == errors
    assert manifest["snr_db"] == report.snr_db


def test_nothing_is_measured_unless_asked(megatron_run: Runs, tmp_path: Path) -> None:
    source = megatron_run("llama").checkpoint("per_layer")
    report = convert_checkpoint(source, tmp_path / "out", Recipe(target="hf", quant="fp8"))
    assert (report.relative_errors, report.snr_db) == ({}, None)
    manifest = json.loads((tmp_path / "out" / "fuseport-manifest.json").read_text())
    assert (manifest["relative_errors"], manifest["snr_db"]) == ({}, None)


def test_the_command_line_says_it(megatron_run: Runs, tmp_path: Path) -> None:
    source = megatron_run("llama").checkpoint("per_layer")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--target", "hf", "--measure"]
    result = CliRunner().invoke(app, [*arguments, "--quant", "nvfp4"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "quantisation: signal to noise" in text
    assert "over 21 weights; largest relative error 0." in text
