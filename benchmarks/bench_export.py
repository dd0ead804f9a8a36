"""A state dict on the GPU becomes a published checkpoint: one rank of a Llama-3-70B, 8.6 GB e4m3.

    python -m benchmarks.bench_export DIRECTORY [--layers 80]

Needs a GPU, megatron-core, and 20 GB free in DIRECTORY. Beside it, in the same process,
Megatron-Core's converter and `safetensors.save_file` make the same rank file from the same state
dict; its tensors are compared bit for bit before a figure is printed. Times are without fsync;
fsync is shown apart. The first call of each pays for its memory; all calls are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fuseport.converter import ModelSpec, Recipe, export_state_dict, verify_checkpoint
from fuseport.converter.timings import Timings
from fuseport.kernels.move import GivenScale

from .bench_dropin import megatron_converter, reference
from .bench_rank import MODULES, TP, shard
from .measure import machine
from .models import LLAMA_70B

State = dict[str, torch.Tensor]
# So that what both make is the layers, and nearly nothing else.
VOCABULARY, SCALE, CALLS = 1024, 50.0, 3
FILES = 8


def rank_of(layers: int) -> tuple[ModelSpec, State]:
    """A rank's own sizes as a whole model, and its weights."""
    whole = LLAMA_70B.replace(num_layers=layers)
    own = whole.replace(
        num_attention_heads=whole.num_attention_heads // TP,
        num_query_groups=whole.num_query_groups // TP,
        ffn_hidden_size=whole.ffn_hidden_size // TP,
        vocab_size=VOCABULARY,
        model_type="llama",
    )
    state = shard(whole, TP)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.randn(
            VOCABULARY, whole.hidden_size, device="cuda", dtype=torch.bfloat16
        )
    state["decoder.final_layernorm.weight"] = torch.ones(
        whole.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    return own, state


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def fsync_seconds(directory: Path) -> float:
    """What it takes to bring a directory's files to the disk."""
    begin = time.perf_counter()
    for file in directory.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - begin


def ours(own: ModelSpec, state: State, out: Path, recipe: Recipe, given: bool) -> list[float]:
    """Times of some calls; prints the stages of the last one, and fsync's time."""
    names = [f"transformer.layers.{n}.{m}" for n in range(own.num_layers) for m in MODULES]
    scales = {name: GivenScale(SCALE) for name in names} if given else None
    times: list[float] = []
    for _ in range(CALLS):
        shutil.rmtree(out, ignore_errors=True)
        timings = Timings()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times.append(
            seconds(
                lambda p=timings: export_state_dict(  # type: ignore[misc]
                    state, own, recipe, out, scales=scales, timings=p, sync=False
                )
            )
        )
    extra = torch.cuda.max_memory_allocated() - before
    files = len(list(out.glob("*.safetensors")))
    shown = ", ".join(f"{one:.2f}" for one in times)
    print(f"fuseport, {recipe.target}, {files} files: {shown} s; fsync {fsync_seconds(out):.2f} s; "
          f"{extra / (1 << 20):.0f} MiB more on the GPU")  # fmt: skip
    for name, stage in timings.stages.items():
        print(f"    {name:10} busy {stage.seconds:6.2f} s {stage.nbytes / 1e9:6.2f} GB")
    verify_checkpoint(out)
    return times


def megatrons(state: State, layers: int, file: Path) -> list[float]:
    """Times of Megatron's conversion into host memory and `save_file`, together."""
    times: list[float] = []
    with megatron_converter(on_gpu=False):
        convert = reference(state, layers, fp8=True)
        for _ in range(CALLS - 1):
            shutil.rmtree(file.parent, ignore_errors=True)
            file.parent.mkdir(parents=True)

            def run() -> None:
                weights = convert()
                torch.cuda.synchronize()
                save_file({n: t.contiguous() for n, t in weights.items()}, file)

            times.append(seconds(run))
    shown = ", ".join(f"{one:.2f}" for one in times)
    fsync = fsync_seconds(file.parent)
    print(f"Megatron-Core and save_file: {shown} s; fsync {fsync:.2f} s")
    return times


def check(found: State, expected: State) -> None:
    """Raise unless every layer tensor of Megatron's is ours, bit for bit."""
    compared = 0
    for name, tensor in expected.items():
        if ".layers." in name and name in found:
            one, other = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            if not torch.equal(one, other):
                raise SystemExit(f"{name} differs: no figures")
            compared += 1
    if not compared:
        raise SystemExit("no tensors in common: no figures")
    print(f"{compared} tensors are equal bit for bit")


def main() -> None:
    """Check, then print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LLAMA_70B.num_layers)
    arguments = parser.parse_args()
    print(machine())
    own, state = rank_of(arguments.layers)
    layers_only = {name: one for name, one in state.items() if name.startswith("decoder.")}
    base = arguments.directory
    theirs = megatrons(layers_only, arguments.layers, base / "megatron" / "rank0.safetensors")
    rank = ours(own, state, base / "rank", Recipe(), True)
    check(load_file(base / "rank" / "rank0.safetensors"),
          load_file(base / "megatron" / "rank0.safetensors"))  # fmt: skip
    for name in ("rank", "megatron"):
        shutil.rmtree(base / name)
    size = sum(one.nbytes for one in layers_only.values()) // 2 // FILES
    hf = ours(own, state, base / "hf", Recipe(target="hf", quant="fp8", shard_size=size), False)
    shutil.rmtree(base / "hf")
    for name, times in (("one rank file", rank), ("hf", hf)):
        first, best = theirs[0] / times[0], min(theirs) / min(times)
        print(f"{name}: {first:.1f} times as fast at the first call, {best:.1f} at the best")


if __name__ == "__main__":
    main()
