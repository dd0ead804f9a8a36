"""A new process: how soon is the first result there, once the weights are on the GPU?

    python -m benchmarks.fresh WAY < TASK

`bench_fresh` runs it. Nothing of fuseport or of torch.compile is imported before the clock starts:
each way pays for its own imports, compilations and tables. TASK is JSON: the tensors' shapes, the
model's facts, the recipe, the scheme. Prints JSON: seconds to each point on the way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from .plain_torch import Matrix, captured, compiled, converter, hf_modules, linears

Task = dict[str, Any]
Weights = dict[str, torch.Tensor]
Done = Callable[[str], None]


def fuseport(weights: Weights, task: Task, done: Done) -> list[Matrix]:
    """The public call."""
    from fuseport.converter import ModelSpec, Recipe, convert_state_dict

    (found,) = convert_state_dict(weights, ModelSpec(**task["spec"]), Recipe(**task["recipe"]))
    done("first result")
    return [(found[f"{module}.weight"], None) for module in hf_modules(weights)]


def torch_compile(weights: Weights, task: Task, done: Done) -> list[Matrix]:
    """Each weight by torch.compile, and then all of them captured in a CUDA graph."""
    spec, pairs = task["spec"], linears(weights)
    device = pairs[0][1].device
    convert = compiled(task["scheme"], device)
    scale = torch.tensor([task["quant_scale"]], device=device)
    groups, head = spec["num_query_groups"], spec["kv_channels"]

    def run() -> list[Matrix]:
        return [one for kind, value in pairs for one in convert(value, kind, groups, head, scale)]

    result = run()
    done("first result")
    if device.type == "cuda":
        # A second call before a capture is what torch's documentation asks for.
        result = run()
        del result
        result = captured(run)()
        done("first replay")
    return result


def triton_alone(weights: Weights, task: Task, done: Done) -> list[Matrix]:
    """What any way with a Triton kernel takes; its cache's key is a hash of its whole library."""
    import triton

    @triton.jit
    def nothing(pointer):  # type: ignore[no-untyped-def]
        pass

    nothing[(1,)](next(iter(weights.values())))
    done("first result")
    return []


WAYS = {"fuseport": fuseport, "torch.compile, CUDA graph": torch_compile}
# What converts nothing.
FLOORS = {"Triton, an empty kernel": triton_alone}


def is_right(found: list[Matrix], weights: Weights, task: Task) -> bool:
    """The first weights' matrices, within one code of what plain torch makes of them."""
    spec, convert = task["spec"], converter(task["scheme"])
    kind, value = linears(weights)[0]
    scale = torch.tensor([task["quant_scale"]], device=value.device)
    expected = convert(value, kind, spec["num_query_groups"], spec["kv_channels"], scale)
    return all(
        torch.allclose(one.float(), other.float(), rtol=0.125, atol=2.0**-9)
        for (one, _), (other, _) in zip(found[: len(expected)], expected, strict=True)
    )


def main() -> None:
    """Make the weights, start the clock, convert, check."""
    task: Task = json.load(sys.stdin)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16)
        for name, shape in task["shapes"].items()
    }
    points: dict[str, float] = {}

    def done(point: str) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        points[point] = time.perf_counter() - begin

    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    way = sys.argv[1]
    found = (WAYS | FLOORS)[way](weights, task, done)
    right = way in FLOORS or is_right(found, weights, task)
    print(json.dumps({"right": right, "points": points}))


if __name__ == "__main__":
    main()
