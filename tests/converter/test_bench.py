"""`fuseport bench`: what it prints without a GPU, and that a wrong result has no figure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from typer.testing import CliRunner

from fuseport.converter import bench, cli
from fuseport.converter.errors import VerificationError
from fuseport.converter.state import convert_state_dict


def test_a_cpu_gets_toy_figures_and_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REPEATS", 1)
    done = CliRunner().invoke(cli.app, ["bench", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    words = re.sub(r"\s+", " ", done.output)
    assert "no GPU here" in words
    assert "say nothing of what a GPU does" in words
    assert "on the CPU, at toy size" in words
    assert len(re.findall(r"\d+\.\d+ ms", words)) == 2 * len(bench.SCHEMES)
    assert len(re.findall(r"\d+%", words)) == len(bench.SCHEMES)


def test_bytes_and_shares_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REPEATS", 1)
    made = bench.prepare(torch.device("cpu"))
    plain, rows, blocks = made.schemes()
    # 2 layers: a hidden size of 256, 2 heads and a KV head of 128, an MLP of 128.
    linears = 2 * (512 * 256 + 256 * 256 + 3 * 128 * 256)
    assert made.nbytes == 2 * (linears + 2 * 256 * 256 + 5 * 256)
    assert plain.nbytes == 2 * made.nbytes
    scales = 4 * 2 * (256 + 128 + 128 + 256 + 128 + 128 + 256)
    assert rows.nbytes == 2 * made.nbytes - linears + scales
    assert blocks.nbytes == 2 * made.nbytes - linears + 4 * 2 * (4 + 2 + 2 + 4 + 2 + 2 + 2)
    for one in (plain, rows, blocks):
        assert one.share == pytest.approx(one.nbytes / one.kept / made.copy)


def test_a_wrong_result_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object, **options: object) -> list[Mapping[str, torch.Tensor]]:
        (found,) = convert_state_dict(*arguments, **options)  # type: ignore[arg-type]
        found["model.layers.1.mlp.down_proj.weight"].view(torch.uint8)[3, 5] ^= 1
        return [found]

    made = bench.prepare(torch.device("cpu"))
    monkeypatch.setattr(bench, "convert_state_dict", wrong)
    with pytest.raises(VerificationError, match=r"bf16 → bf16: model\.layers\.1\.mlp\.down_proj"):
        list(made.schemes())
