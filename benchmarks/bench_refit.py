"""A refit of live weights beside a plain copy, and beside split and per-tensor block cast.

    python -m benchmarks.bench_refit [--layers N] [--bucket MIB]

One tensor parallel rank of a Llama-3-70B (tp 8) and one expert parallel rank of a Qwen3-235B-A22B
(ep 8, of its layers as many as fit), bf16, into the Hugging Face layout. Every result is first
compared with the reference bit for bit; a red one prints no figure. Times include the Python call:
`device` by events around the call, `wall` from the call to the end of the work with an idle GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.refit import Refit

from .block_cast import block_cast, split_and_cast, verl_cast
from .measure import copy_bandwidth, machine, milliseconds
from .models import LLAMA_70B, QWEN3_235B_EP8, of_rank, random_weights, shapes

Weights = dict[str, torch.Tensor]
MIB = 1 << 20


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def is_equal(refit: Refit, weights: Weights, spec: ModelSpec, recipe: Recipe) -> bool:
    """Poison the outputs, change the weights, refit, and compare with the reference."""
    (found,) = refit.run()
    for tensor in found.values():
        tensor.view(torch.uint8).fill_(0xA5) if tensor.ndim else tensor.fill_(float("nan"))
    for value in weights.values():
        value.mul_(-1.25)
    refit.run()
    (expected,) = convert_state_dict(weights, spec, recipe, backend="torch")
    return found.keys() == expected.keys() and all(
        same_bits(found[name], expected[name]) for name in found
    )


def moved_bytes(refit: Refit, weights: Weights) -> int:
    """Bytes that must be read and written: every weight is read once, every result written."""
    (found,) = refit.run()
    return sum(t.nbytes for t in weights.values()) + sum(t.nbytes for t in found.values())


def wall(run: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds from the call on an idle GPU to the end of its work."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return float(statistics.median(times))


def line(name: str, nbytes: int, run: Callable[[], object], copy: float) -> None:
    """Time and print one way."""
    device, whole = milliseconds(run), wall(run)
    print(
        f"  {name:30} {nbytes / 1e9:6.2f} GB  device {device:8.3f} ms {nbytes / device / copy:6.3f}"
        f"  wall {whole:8.3f} ms {nbytes / whole / copy:6.3f} of copy",
        flush=True,
    )


def bucket_line(weights: Weights, spec: ModelSpec, recipe: Recipe, limit: int) -> None:
    """Time of a refit in buckets, and the extra memory at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    refit, largest = Refit(weights, spec, recipe), 0

    def run() -> None:
        nonlocal largest
        for bucket in refit.buckets(limit):
            largest = max(largest, sum(tensor.nbytes for _, tensor in bucket))

    run()
    extra = torch.cuda.max_memory_allocated() - before
    print(
        f"  buckets of {limit // MIB} MiB: largest {largest / MIB:.0f} MiB, extra memory "
        f"{extra / MIB:.0f} MiB, device {milliseconds(run):.3f} ms",
        flush=True,
    )


def report(name: str, spec: ModelSpec, quant: str, copy: float, limit: int) -> None:
    """One model and one scheme: check, then time every way."""
    weights = random_weights(shapes(spec), torch.device("cuda"))
    recipe = Recipe(target="hf", quant=quant)
    began = time.perf_counter()
    refit = Refit(weights, spec, recipe)
    refit.run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(f"{name}, {quant}: {len(weights)} parameters, planned in {seconds:.2f} s")
    if not is_equal(refit, weights, spec, recipe):
        print("  RED: not equal to the reference; no figure")
        return
    nbytes = moved_bytes(refit, weights)
    line("refit.run()", nbytes, refit.run, copy)
    graph = Refit(weights, spec, recipe, graph=True, outputs=refit.run())
    line("refit.run(), graph", nbytes, graph.run, copy)
    del graph, refit
    torch.cuda.empty_cache()
    bucket_line(weights, spec, recipe, limit)
    if quant == "fp8-block":
        line("split + block cast", nbytes, partial(split_and_cast, weights, spec, block_cast), copy)
        cast = verl_cast()
        if cast is None:
            print("  verl is not installed: its cast was not compared")
        else:
            line("split + verl's cast", nbytes, partial(split_and_cast, weights, spec, cast), copy)


def main() -> None:
    """Both models, both schemes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="of each model; by default 80 and 24")
    parser.add_argument("--bucket", type=int, default=1024, help="MiB")
    options = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{machine()}\ncopy {copy / 1e6:.0f} GB/s")
    models = {"Llama-3-70B, tp 8": of_rank(LLAMA_70B, 8), "Qwen3-235B-A22B, ep 8": QWEN3_235B_EP8}
    for name, spec in models.items():
        spec = spec.replace(num_layers=options.layers or spec.num_layers)
        for quant in ("fp8-block", "none"):
            report(name, spec, quant, copy, options.bucket * MIB)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
