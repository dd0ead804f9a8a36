"""A state dict on the GPU becomes a published checkpoint: one rank of a Llama-3-70B, in e4m3.

    python -m benchmarks.run export [--options=--directory=DIRECTORY]

Needs 20 GB free in DIRECTORY. Beside it Megatron-Core's converter and `safetensors.save_file` make
the same rank file from the same state dict; its tensors are compared bit for bit before a figure
is shown. Times are without fsync, which is shown apart. The first call of each pays for its memory.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuseport.converter import Recipe, export_state_dict, verify_checkpoint
from fuseport.converter.timings import Timings
from fuseport.kernels.move import GivenScale

from .bench_peers import DENSE, TP
from .conftest import Bench
from .measure import seconds
from .megatron_peer import converter
from .models import MODULES, of_rank, random_weights, shapes
from .results import Row
from .work import QUANT_SCALE, same_bits

State = dict[str, torch.Tensor]
CASE, CALLS, FILES = "dense rank, to a checkpoint", 3, 8
# So that what both make is the layers, and nearly nothing else.
OWN = of_rank(DENSE, TP).replace(vocab_size=1024, model_type="llama")


@pytest.fixture(scope="module")
def state(bench: Bench) -> State:
    """One rank as a whole model."""
    return random_weights(shapes(OWN), bench.device)


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints go."""
    given: Path | None = request.config.getoption("--directory")
    return given or tmp_path_factory.mktemp("export")


def fsync_seconds(directory: Path) -> float:
    """What it takes to bring a directory's files to the disk."""

    def sync() -> None:
        for file in directory.iterdir():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    return seconds(sync)


def calls(out: Path, run: Callable[[], object]) -> list[float]:
    """Times of some calls, each into a new directory."""
    times = []
    for _ in range(CALLS):
        shutil.rmtree(out, ignore_errors=True)
        times.append(seconds(run))
    return times


def row(way: str, out: Path, times: list[float], **details: float) -> Row:
    """The warm calls' median; the first call beside it."""
    first, *warm = times
    size = sum(file.stat().st_size for file in out.iterdir())
    spread = max(warm) - min(warm)
    more = {"first_call": first, "fsync": fsync_seconds(out), **details}
    return Row(CASE, "given", way, size, statistics.median(warm), spread, len(warm), details=more)


def ours(state: State, recipe: Recipe, out: Path, given: bool) -> tuple[list[float], Timings]:
    """Times, and the last call's stages."""
    names = [f"transformer.layers.{n}.{m}" for n in range(OWN.num_layers) for m in MODULES]
    scales = {name: GivenScale(QUANT_SCALE) for name in names} if given else None
    last = Timings()

    def run() -> None:
        nonlocal last
        last = Timings()
        export_state_dict(state, OWN, recipe, out, scales=scales, timings=last, sync=False)

    return calls(out, run), last


def busy(timings: Timings) -> dict[str, float]:
    """Busy seconds by stage; stages overlap."""
    return {f"busy {name}": stage.seconds for name, stage in timings.stages.items()}


def megatrons(state: State, out: Path, bench: Bench) -> list[float]:
    """Megatron's conversion into host memory and `save_file`, together."""
    layers = {name: value for name, value in state.items() if name.startswith("decoder.")}
    where = bench.device if bench.is_toy else None
    convert = converter(layers, DENSE, TP, QUANT_SCALE, where)

    def run() -> None:
        weights = convert()
        if not bench.is_toy:
            torch.cuda.synchronize()
        out.mkdir(parents=True)
        whole = {name: value.contiguous() for name, value in weights.items()}
        save_file(whole, out / "rank0.safetensors")

    return calls(out, run)


def common_are_equal(one: Path, other: Path) -> bool:
    """True if the layers' tensors of two files are equal, and there are some."""
    found, expected = load_file(one), load_file(other)
    names = [name for name in expected if ".layers." in name and name in found]
    return bool(names) and all(same_bits(found[n], expected[n]) for n in names)


def test_one_file(state: State, directory: Path, bench: Bench) -> None:
    """The unified checkpoint's file of one rank, by both."""
    pytest.importorskip("megatron.core")
    own, other = directory / "rank", directory / "megatron"
    theirs = megatrons(state, other, bench)
    times, timings = ours(state, Recipe(), own, given=True)
    if not common_are_equal(own / "rank0.safetensors", other / "rank0.safetensors"):
        pytest.fail("RED: the files differ; no figure")
    bench.add("export", row("fuseport, one file", own, times, **busy(timings)))
    bench.add("export", row("Megatron-Core and save_file", other, theirs))
    shutil.rmtree(own)
    shutil.rmtree(other)


def test_several_files(state: State, directory: Path, bench: Bench) -> None:
    """The Hugging Face layout in several files, with computed scales."""
    out = directory / "hf"
    size = sum(value.nbytes for value in state.values()) // 2 // FILES
    recipe = Recipe(target="hf", quant="fp8", shard_size=max(size, 1 << 20))
    times, timings = ours(state, recipe, out, given=False)
    verify_checkpoint(out)
    name = f"fuseport, {len(list(out.glob('*.safetensors')))} files"
    bench.add("export", row(name, out, times, **busy(timings)))
    shutil.rmtree(out)
