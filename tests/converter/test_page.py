"""The report of a conversion: what it says, and that it says it without anything from outside."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuseport_testing.command import Run
from fuseport_testing.tiny import FACTS, tiny_weights, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint
from fuseport.converter.page.boxes import MOST, Area, boxes
from fuseport.converter.page.facts import error_grid, kinds, sizes
from fuseport.converter.page.journey import journey
from fuseport.converter.page.roles import Atlas
from fuseport.converter.timeline import SPANS, Timeline
from fuseport.converter.timings import Timings
from fuseport.kernels.move import Move

Saved = Callable[[str], Path]
TITLES = [
    "Summary",
    "What went where",
    "Bytes by kind",
    "Quantisation error",
    "Saturated and non-finite values",
    "Stages",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("s") / "tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(name)` → a small Hugging Face model's directory."""
    pytest.importorskip("transformers")
    from fuseport_testing.hf_models import BY_NAME, make, wide

    def get(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        make(wide(BY_NAME[name])).save_pretrained(path)
        return path

    return get


def elements(area: Area, matrix: np.ndarray[Any, Any]) -> set[int]:
    return set(matrix[area.top : area.bottom, area.left : area.right].flatten().tolist())


@st.composite
def moves(draw: st.DrawFn) -> tuple[Move, torch.Tensor, torch.Tensor]:
    """A part of one matrix that becomes a part of another, as rules cut and shuffle them."""
    groups, heads, size, width = (draw(st.integers(1, 4)) for _ in range(4))
    whole = torch.arange(groups * (heads + 2) * size * width).view(-1, width)
    q = whole.unflatten(0, (groups, heads + 2, size))[:, :heads]
    src = draw(st.sampled_from((q, q.movedim(1, 2), q[..., width // 2 :], q[groups // 2 :])))
    layout = draw(st.sampled_from(("rows", "columns", "turned")))
    if layout == "columns":
        dst = torch.empty(src.shape[0], src[0].numel(), dtype=torch.int64)
    elif layout == "turned":
        dst = torch.empty(src.shape[-1], src[..., 0].numel(), dtype=torch.int64)
        return Move(dst.T.unflatten(0, src.shape[:-1]), src), dst, whole
    else:
        dst = torch.empty(src[..., 0].numel(), src.shape[-1], dtype=torch.int64)
    return Move(dst.view(src.shape), src), dst, whole


@settings(deadline=None, max_examples=200)
@given(moves())
def test_boxes_hold_the_same_elements_on_both_sides(
    made: tuple[Move, torch.Tensor, torch.Tensor],
) -> None:
    move, dst, whole = made
    dst.fill_(-1)
    move.dst.copy_(move.src)
    found = boxes(move, 0, whole.shape[1], dst.shape[1])
    seen: list[int] = []
    for box in found:
        assert box.exact
        there = elements(box.dst, dst.numpy())
        assert there == elements(box.src, whole.numpy())
        seen += there
    assert sorted(seen) == sorted(move.src.flatten().tolist())


def test_too_many_boxes_become_one() -> None:
    whole, dst = torch.arange(4 * MOST).view(2, -1), torch.zeros(2, MOST, dtype=torch.int64)
    (box,) = boxes(Move(dst, whole[:, ::2]), 0, whole.shape[1], MOST)
    assert not box.exact
    assert (box.src, box.dst) == (Area(0, 2, 0, 2 * MOST), Area(0, 2, 0, MOST))


def test_packed_codes_are_of_twice_as_many_columns(saved: Saved) -> None:
    plan = plan_checkpoint(saved("llama"), Recipe(target="hf", quant="nvfp4"))
    way = journey(plan, Atlas(plan))
    for departure in way.departures:
        whole = Area(0, departure.matrix.rows, 0, departure.matrix.columns)
        (arrival,) = departure.arrivals.values()
        ((_, box),) = arrival.boxes
        assert box.src == whole
        assert box.dst == Area(0, whole.bottom, 0, whole.right // 2)


def test_a_journey_from_megatron(source: Path) -> None:
    plan = plan_checkpoint(source, Recipe(tp_size=2))
    way = journey(plan, Atlas(plan))
    assert (way.layer, way.layers, way.alike, way.norms) == (1, 2, 0, 2)
    qkv = way.departures[0]
    assert qkv.matrix.name == "decoder.layers.1.self_attention.linear_qkv.weight"
    assert (qkv.matrix.rows, qkv.matrix.columns) == (32, 16)
    assert qkv.parts == ["attention q", "attention k", "attention v"]
    # Two query groups of two heads, a key and a value of 4 rows; a rank has one of them.
    found = [
        (one.file, part, box.src.top, box.src.bottom, box.dst.top)
        for one in qkv.arrivals.values()
        for part, box in one.boxes
    ]
    assert found == [
        ("rank0.safetensors", "attention q", 0, 8, 0),
        ("rank0.safetensors", "attention k", 8, 12, 8),
        ("rank0.safetensors", "attention v", 12, 16, 12),
        ("rank1.safetensors", "attention q", 16, 24, 0),
        ("rank1.safetensors", "attention k", 24, 28, 8),
        ("rank1.safetensors", "attention v", 28, 32, 12),
    ]


def test_a_journey_shows_some_targets_of_each_part(tmp_path: Path) -> None:
    source = write_tiny(tmp_path, facts={**FACTS, "num_attention_heads": 16, "kv_channels": 1})
    plan = plan_checkpoint(source, Recipe(tp_size=8), {"num_query_groups": 8})
    first = next(one for one in journey(plan, Atlas(plan)).departures if len(one.parts) == 2)
    assert len(first.arrivals) == 16
    assert [(one.boxes[0][0], one.file[:5]) for one in first.shown] == [
        (part, f"rank{rank}") for part in ("MLP gate", "MLP up") for rank in range(4)
    ]


# The kind of a target tensor by words of its name, for the layout that transformers loads.
WORDS = (
    ("layernorm", "norms"), ("norm.weight", "norms"), ("shared_expert", "shared experts"),
    ("mlp.experts", "experts"), ("mlp.gate.", "router"), ("self_attn", "attention"),
    ("mlp.", "MLP"), ("embed_tokens", "embedding"), ("lm_head", "output"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "quant"), [("qwen2_moe", "none"), ("deepseek", "fp8-block"), ("qwen3", "nvfp4")]
)
def test_kinds_and_sizes(saved: Saved, name: str, quant: str) -> None:
    plan = plan_checkpoint(saved(name), Recipe(target="hf", quant=quant))
    atlas = Atlas(plan)
    for planned, kind in zip(plan.tensors, kinds(plan.tensors, atlas), strict=True):
        assert kind == next(kind for word, kind in WORDS if word in planned.name), planned.name
    found = sizes(plan, atlas)
    assert sum(one.source for one in found.values()) == plan.source.nbytes
    assert sum(one.target for one in found.values()) == sum(one.nbytes for one in plan.tensors)


def test_errors_by_layer_and_part(source: Path, tmp_path: Path) -> None:
    plan = plan_checkpoint(source, Recipe(tp_size=2, quant="fp8-row"))
    report = convert_checkpoint(plan, tmp_path / "out", measure=True)
    grid = error_grid(plan, Atlas(plan), report.relative_errors)
    assert grid.rows == [0, 1]
    assert grid.columns == [
        "attention q+k+v", "attention out", "MLP gate", "MLP up", "MLP down",
    ]  # fmt: skip
    assert grid.values.keys() == {(row, column) for row in (0, 1) for column in grid.columns}
    name = "transformer.layers.1.mlp.proj.weight"
    known = {f"rank0/{name}": 0.5, f"rank1/{name}": 0.25}
    assert error_grid(plan, Atlas(plan), known).values == {(1, "MLP down"): 0.5}


def test_kept_codes_count_as_their_weight(saved: Saved, tmp_path: Path) -> None:
    recipe = Recipe(target="hf", quant="fp8-row")
    convert_checkpoint(saved("llama"), tmp_path / "quantised", recipe)
    plan = plan_checkpoint(tmp_path / "quantised", recipe)
    found = sizes(plan, Atlas(plan))
    assert found.keys() == {"embedding", "norms", "attention", "MLP", "output"}
    assert all(one.source == one.target for one in found.values())
    first = journey(plan, Atlas(plan)).departures[0]
    assert first.matrix.dtype == "float8_e4m3fn"
    assert [one.matrix.name for one in first.arrivals.values()] == [first.matrix.name]


def test_a_timeline_keeps_its_seconds() -> None:
    timeline = Timeline(width=0.5)
    timeline.add("read", 0.25, 1.75)
    assert timeline.busy["read"][:5] == [0.25, 0.5, 0.5, 0.25, 0.0]
    timeline.add("write", 100, 500)
    assert timeline.width == 4.0
    assert len(timeline.busy["read"]) == len(timeline.busy["write"]) == SPANS
    assert timeline.busy["read"][:2] == [1.5, 0.0]
    assert timeline.busy["write"][24:27] == [0.0, 4.0, 4.0]
    assert sum(timeline.busy["write"]) == 400


def test_timings_fill_the_timeline_until_they_stop() -> None:
    times = Timings()
    times.add("read", 0.0, 7)
    times.add("kernel", 1e9, 7)
    assert sum(times.timeline.busy["kernel"]) == pytest.approx(times.elapsed, abs=0.5)
    times.stop()
    assert times.elapsed == times.elapsed


def test_the_page_holds_everything(run: Run, tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["output_layer.weight"][3, 5] = 1e6
    source = write_tiny(tmp_path / "<i>s&", weights)
    out, directory = tmp_path / 'o"<b>', tmp_path / "a" / "report"
    printed, _ = run(
        "convert", source, out, "--dtype", "float16", "--tp", 2, "--quant", "fp8-row",
        "--report", directory,
    )  # fmt: skip
    assert "index.html" in printed.replace("\n", "")
    html = (directory / "index.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == TITLES
    assert not re.search(r"<script|https?://|<link|@import|url\(|<i>|<b>", html)
    images = re.findall(r'src="data:image/png;base64,(.*?)"', html)
    inside = list(map(base64.b64decode, images))
    pictures = {path.name: path.read_bytes() for path in directory.glob("*.png")}
    assert sorted(pictures) == ["errors.png", "journey.png", "sizes.png", "stages.png"]
    assert sorted(inside) == sorted(pictures.values())
    assert html.count('src="') == len(inside)
    assert "rank0/lm_head.weight" in html
    assert "1 values in 1 tensors exceed their format" in html
    assert "tp_size = 2, dtype = float16, quant = fp8-row" in html
    run("verify", out, "--source", source)
    # What else lies there stays.
    (directory / "mine").touch()
    run("convert", source, out, "--overwrite", "--report", directory)
    assert (directory / "mine").exists()
    assert "No weight was quantised" in (directory / "index.html").read_text()


def test_reports_that_cannot_be(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    file.touch()
    for directory, message in (
        (out / "report", "OutputError: --report"),
        (source / "report", "OutputError: --report"),
        (file, "OutputError: --report"),
    ):
        _, err = run("convert", source, out, "--report", directory, status=1)
        assert err.startswith(message)
    _, err = run("convert", source, out, "--report", tmp_path / "r", "--dry-run", status=1)
    assert err.startswith("RecipeError: --report tells of a conversion")
    found = importlib.util.find_spec
    without = {"matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in without else found(name)
    )
    _, err = run("convert", source, out, "--report", tmp_path / "r", status=1)
    assert err.startswith("MissingPackageError: ")
    assert "pip install 'fuseport[report]'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
