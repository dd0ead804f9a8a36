"""A state dict on the GPU becomes a published checkpoint: one rank of a Llama-3-70B, in e4m3.

    python -m benchmarks.run export [--options=--directory=DIRECTORY]

Needs 40 GB free in DIRECTORY. Beside it Megatron-Core's converter and `safetensors.save_file` make
one file from the same state dict; where fuseport makes one too, its tensors are compared bit for
bit before a figure is shown. All take turns, and each call begins when what was written before is
on the disk and memory is at hand. Times are without fsync, which is shown apart. A first call
registers its buffers with the GPU's driver.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuseport.converter import Recipe, export_state_dict, verify_checkpoint
from fuseport.converter.slabs import forget
from fuseport.converter.timings import Timings

from .bench_peers import DENSE, TP
from .conftest import Bench
from .measure import seconds
from .megatron_peer import converter
from .models import given_scales, of_rank, random_weights, shapes
from .results import Row
from .work import QUANT_SCALE, same_bits

State = dict[str, torch.Tensor]
CALLS, FILES = 4, (8, 16)
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


def have_memory(nbytes: int) -> None:
    """Touch memory and free it, so that the system has it at hand.

    A virtual machine gives free memory back to its host within seconds. To have it again takes
    longer than to write it, and that would be most of what is measured.
    """
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)


@dataclass
class Way:
    """A way to make a checkpoint in `out`, and what its calls took, in seconds."""

    name: str
    scheme: str
    out: Path
    run: Callable[[], object]
    timings: Timings | None = None
    times: list[float] = field(default_factory=list)
    fsyncs: list[float] = field(default_factory=list)

    def call(self, memory: int) -> None:
        """Once more, into a new directory, with so many bytes of memory at hand."""
        shutil.rmtree(self.out, ignore_errors=True)
        if not self.times:
            forget()
        # What others wrote would be brought to the disk meanwhile, and take its time.
        os.sync()
        have_memory(memory)
        self.times.append(seconds(self.run))
        self.fsyncs.append(fsync_seconds(self.out))

    def row(self, case: str, own: Way) -> Row:
        """The warm calls' median; `ratio` is to fuseport's `own` way."""
        first, *warm = self.times
        size = sum(file.stat().st_size for file in self.out.iterdir())
        median = statistics.median(warm)
        details = {"first_call": first, "fsync": statistics.median(self.fsyncs)}
        ratio = None
        if self is not own:
            ratio = median / statistics.median(own.times[1:])
            details["first_ratio"] = first / own.times[0]
        return Row(
            case, own.scheme, self.name, size, median, max(warm) - min(warm), len(warm),
            ratio=ratio, details=details | busy(self.timings),
        )  # fmt: skip


def busy(timings: Timings | None) -> dict[str, float]:
    """Busy seconds by stage, summed over threads; stages overlap."""
    stages = {} if timings is None else timings.stages
    return {f"busy {name}": stage.seconds for name, stage in stages.items()}


def ours(state: State, recipe: Recipe, out: Path, given: bool) -> Way:
    """Fuseport's, with the last call's stages."""
    scales = given_scales(OWN, QUANT_SCALE) if given else None

    def run() -> None:
        way.timings = Timings()
        export_state_dict(state, OWN, recipe, out, scales=scales, timings=way.timings, sync=False)

    way = Way("fuseport", "given" if given else "tensor", out, run)
    return way


def several(state: State, out: Path, files: int) -> Way:
    """The Hugging Face layout in about so many files of one size, with computed scales."""
    sizes = [value.nbytes for value in state.values()]
    # A file ends before the tensor that does not fit any more: half of one is left on average.
    size = sum(sizes) // 2 // files + max(sizes) // 8
    recipe = Recipe(target="hf", quant="fp8", shard_size=max(size, 1 << 20))
    return ours(state, recipe, out, given=False)


def megatrons(state: State, out: Path, bench: Bench) -> Way:
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

    return Way("Megatron-Core and save_file", "given", out, run)


def common_are_equal(one: Path, other: Path) -> bool:
    """True if the layers' tensors of two files are equal, and there are some."""
    found, expected = load_file(one), load_file(other)
    names = [name for name in expected if ".layers." in name and name in found]
    return bool(names) and all(same_bits(found[n], expected[n]) for n in names)


def test_export(state: State, directory: Path, bench: Bench) -> None:
    """One file by both, and several by fuseport."""
    pytest.importorskip("megatron.core")
    theirs = megatrons(state, directory / "megatron", bench)
    one = ours(state, Recipe(), directory / "rank", given=True)
    many = [several(state, directory / f"hf{files}", files) for files in FILES]
    # The result is half as large: once in the host's memory, as one way has it, and once in files.
    memory = sum(value.nbytes for value in state.values())
    for _ in range(CALLS):
        for way in (theirs, one, *many):
            way.call(memory)
    if not common_are_equal(one.out / "rank0.safetensors", theirs.out / "rank0.safetensors"):
        pytest.fail("RED: the files differ; no figure")
    for way in (one, *many):
        verify_checkpoint(way.out)
        files = len(list(way.out.glob("*.safetensors")))
        case = f"dense rank, {files} file{'s' * (files > 1)}"
        bench.add("export", way.row(case, way))
        bench.add("export", theirs.row(case, way))
    for way in (theirs, one, *many):
        shutil.rmtree(way.out)
