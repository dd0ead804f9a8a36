"""The streaming engine: windows of any size give the same files, and memory stays bounded."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseport_testing.cases import CASES
from fuseport_testing.megatron_models import Run
from fuseport_testing.smallest import FACTS, SHAPES
from fuseport_testing.sparse import write_sparse
from fuseport_testing.tiny import write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseport.converter import (
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    export_state_dict,
    plan_checkpoint,
    verify_checkpoint,
)
from fuseport.converter.cuts import clip
from fuseport.converter.errors import RecipeError
from fuseport.converter.limits import BASE, Limits
from fuseport.converter.loads import plan_loads
from fuseport.converter.model import ModelSpec
from fuseport.converter.plan import storage_key
from fuseport.converter.sources.stored import Piece, Stored
from fuseport.converter.timings import STAGES, Timings
from fuseport.converter.windows import windows

Runs = Callable[..., Run]
Conversion = Callable[[Path, Recipe], object]


def contents(directory: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(directory.iterdir())}


def narrow(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(Limits, "window", lambda self, device: size)


# Each case in a layout of its own: windows of a few rows against one window.
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_small_windows_give_the_same_bytes(
    name: str, megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = megatron_run(name)
    facts = {"model_type": name if name in ("gemma", "falcon") else None}
    for layout in run.case.layouts:
        source, recipe = run.checkpoint(layout), Recipe(tp_size=2, dtype="float16")
        convert_checkpoint(source, tmp_path / layout, recipe, facts)
        with monkeypatch.context() as patch:
            narrow(patch, 24 << 10)
            convert_checkpoint(source, tmp_path / f"{layout}_small", recipe, facts)
        assert contents(tmp_path / f"{layout}_small") == contents(tmp_path / layout)


# The tiny Mixtral's experts have rows that NVFP4 cannot hold.
ROW_FORMATS = ["none", "fp8", "fp8-row", "fp8-block"]
PAIRS = [(name, quant) for name in ("llama", "mixtral") for quant in ROW_FORMATS]


@pytest.mark.parametrize(("name", "quant"), [*PAIRS, ("llama", "nvfp4")])
def test_small_windows_and_many_files(
    name: str, quant: str, megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = megatron_run(name).checkpoint("stacked")
    recipe = Recipe(target="hf", quant=quant, shard_size=20_000)
    convert_checkpoint(source, tmp_path / "one", recipe)
    narrow(monkeypatch, 48 << 10)
    convert_checkpoint(source, tmp_path / "many", recipe)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    verify_checkpoint(tmp_path / "many", source)


# So small that weights are cut.
SMALL = 12 << 10


def test_errors_are_summed_up_over_windows(
    megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = megatron_run("llama").checkpoint("stacked"), Recipe(target="hf", quant="fp8")
    whole = convert_checkpoint(source, tmp_path / "one", recipe, measure=True)
    narrow(monkeypatch, SMALL)
    plan = plan_checkpoint(source, recipe)
    filling = [one for one in windows(plan.tensors, plan.stored, SMALL, set(plan.images))
               if not one.measures]  # fmt: skip
    times = Counter(run.planned.name for one in filling for run in one.runs)
    assert max(times.values()) > 1
    cut = convert_checkpoint(source, tmp_path / "many", recipe, measure=True)
    assert len(whole.relative_errors) > 10
    assert cut.relative_errors == pytest.approx(whole.relative_errors, rel=1e-6)
    assert cut.snr_db == pytest.approx(whole.snr_db, rel=1e-6)


def test_a_group_larger_than_a_window_is_measured_first(tmp_path: Path) -> None:
    """Its windows that measure come before those that fill, and read the group once more."""
    source = write_sparse(tmp_path / "s", hidden=256, ffn=512, layers=1, vocab=128, groups=1)
    plan = plan_checkpoint(source, Recipe(target="hf", quant="fp8"))
    found = list(windows(plan.tensors, plan.stored, 256 << 10, set(plan.images)))
    shared = [window for window in found if window.shared is not None]
    assert any(window.measures for window in shared)
    for group in {id(window.shared) for window in shared}:
        phases = [window.measures for window in shared if id(window.shared) == group]
        assert phases == sorted(phases, reverse=True)
        assert len(set(phases)) == 2


def test_every_byte_is_in_one_window(tmp_path: Path) -> None:
    plan = plan_checkpoint(write_tiny(tmp_path / "s"), Recipe(tp_size=2))
    for size in (6 << 10, 20 << 10, 1 << 20):
        filled: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for window in windows(plan.tensors, plan.stored, size, set(plan.images)):
            assert window.nbytes <= size
            for run in window.runs:
                key = run.planned.rank, run.planned.name
                filled.setdefault(key, []).append((run.start, run.stop))
        for planned in plan.tensors:
            ranges = filled[planned.rank, planned.name]
            assert ranges[0][0] == 0
            assert ranges[-1][1] == planned.dst.numel()
            assert all(one[1] == two[0] for one, two in itertools.pairwise(ranges))


def test_a_window_that_holds_no_row_is_refused(tmp_path: Path) -> None:
    plan = plan_checkpoint(write_tiny(tmp_path / "s"), Recipe())
    with pytest.raises(RecipeError, match=r"takes \d+ bytes at once, but a window has 512"):
        list(windows(plan.tensors, plan.stored, 512, set(plan.images)))


@pytest.mark.parametrize(("name", "size"), [("host_memory", 1 << 20), ("gpu_memory", 1 << 20)])
def test_bounds_that_are_too_small(name: str, size: int) -> None:
    with pytest.raises(RecipeError, match=rf"^{name} \(--.*\) is 1 MiB; .* at least"):
        Limits(**{name: size})


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of a storage of 4000 elements, as rules make them."""
    base = torch.arange(4000, dtype=torch.int16)
    shape = draw(st.sampled_from([(4000,), (40, 100), (5, 8, 100), (4, 10, 10, 10), (2, 2000)]))
    view = base.view(shape)
    for _ in range(draw(st.integers(0, 4))):
        axis = draw(st.integers(0, view.ndim - 1))
        length = view.shape[axis]
        start = draw(st.integers(0, length - 1))
        view = view.narrow(axis, start, draw(st.integers(0, length - start)))
        if 0 in view.shape:
            return view
        if draw(st.booleans()):
            view = view.movedim(axis, draw(st.integers(0, view.ndim - 1)))
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(3, *view.shape)
    return view


def on_meta(view: torch.Tensor) -> torch.Tensor:
    return torch.empty(4000, dtype=view.dtype, device="meta").as_strided(
        view.shape, view.stride(), view.storage_offset()
    )


@settings(deadline=None)
@given(st.lists(views(), min_size=1, max_size=4), st.sampled_from([64, 1 << 20]))
def test_what_is_read_is_what_the_views_show(found: list[torch.Tensor], run: int) -> None:
    whole = torch.arange(4000, dtype=torch.int16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuseport.converter.loads.LONG_RUN", run)
        patch.setattr("fuseport.converter.loads.PART", 256)
        for view in found:
            meta = on_meta(view)
            piece = Piece((0,), (4000,), whole)
            loads = plan_loads(
                [meta], {storage_key(meta): Stored("w", (4000,), whole.dtype, (piece,))}
            )
            slab = torch.full((loads.nbytes,), 255, dtype=torch.uint8)
            for load in loads.loads:
                assert sum(task() for task in load.tasks(slab)) == load.numel * 2
            for placed in loads.placed.values():
                assert torch.equal(placed.on(slab), view)
            # Never much more than what the view shows.
            different = len(np.unique(view.numpy())) if view.numel() else 0
            assert loads.nbytes <= 1.25 * 2 * different + 256


@settings(deadline=None)
@given(
    st.sampled_from([(60,), (6, 10), (2, 3, 10), (3, 2, 2, 5), (60, 1), (1, 60)]),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(1, 2),
)
def test_clip_finds_just_the_elements_in_a_range(
    shape: tuple[int, ...], lo: int, hi: int, turns: int
) -> None:
    whole = torch.arange(60 * turns)
    for turn in range(turns):
        dst = whole.view(*shape[:-1], shape[-1] * turns)[..., turn::turns]
        parts = list(clip(dst, dst + 0, lo, hi))
        found = sorted(int(x) for part, _ in parts for x in part.flatten())
        assert found == [x for x in dst.flatten().tolist() if lo <= x < hi]
        assert all(torch.equal(*pair) for pair in parts)


@pytest.mark.parametrize("target", ["trtllm", "hf"])
def test_a_state_dict_is_published(target: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    spec = ModelSpec(**FACTS)  # type: ignore[arg-type]
    recipe = Recipe(target=target, tp_size=2 if target == "trtllm" else 1)
    report = export_state_dict(state, spec, recipe, str(tmp_path / "out"))
    expected = convert_state_dict(state, spec, recipe)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert report.tensors == sum(len(rank) for rank in expected)
    for file, rank in zip(files, expected, strict=True):
        found = load_file(file)
        assert found.keys() == rank.keys()
        assert all(torch.equal(found[name], rank[name]) for name in rank)
    verify_checkpoint(tmp_path / "out")


def test_every_stage_is_timed(tmp_path: Path) -> None:
    timings = Timings()
    source = write_tiny(tmp_path / "s")
    report = convert_checkpoint(source, tmp_path / "out", Recipe(), timings=timings)
    for name in STAGES:
        used = torch.cuda.is_available() or "GPU" not in name
        assert (timings.stages[name].seconds > 0) == used
    length = (tmp_path / "out" / "rank0.safetensors").read_bytes()[:8]
    data = report.nbytes - 8 - int.from_bytes(length, "little")
    assert timings.stages["write"].nbytes == timings.stages["digest"].nbytes == data


# Prints the most memory that the process has held so far, as the system counts it.
BOUNDED = """
import sys
from pathlib import Path
from fuseport.converter import Recipe, convert_checkpoint, verify_checkpoint
from fuseport.converter.limits import Limits
source, out, target, quant, bound = sys.argv[1:]
recipe = Recipe(target=target, quant=quant, tp_size=2 if target == "trtllm" else 1)
limits = Limits(host_memory=int(bound))
def status(field):
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))
# Pages of libraries belong to all processes; a CUDA build of torch has three times as many.
libraries = status("RssFile")
def peak():
    return status("VmHWM") - libraries
convert_checkpoint(Path(source), Path(out), recipe, limits=limits, device="cpu")
print("convert", peak())
verify_checkpoint(Path(out), Path(source), limits=limits)
print("verify", peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quant"), [("trtllm", "none"), ("hf", "fp8"), ("hf", "fp8-block")]
)
def test_memory_stays_below_the_bound(target: str, quant: str, tmp_path: Path) -> None:
    """A model of 0.6 GB, of which single weights are larger than a window."""
    source = write_sparse(tmp_path / "s", hidden=4096, ffn=14336, layers=1, vocab=8192)
    bound = BASE + (128 << 20)
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, source, tmp_path / "out", target, quant, str(bound)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for what in ("convert", "verify"):
        match = re.search(rf"{what} (\d+)", done.stdout)
        assert match is not None
        assert int(match[1]) << 10 < bound, what
