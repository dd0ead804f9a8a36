"""The same conversions in plain torch, tensor by tensor, as a user would write them.

This file imports torch alone: a process that measures how soon torch.compile gives its first
result must not pay for anything else. `convert` takes one of Megatron-Core's linear weights and
gives the Hugging Face matrices, each as (codes, dequant_scales or None).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

E4M3 = torch.float8_e4m3fn
LIMIT, BLOCK = 448.0, 128
_LINEAR = re.compile(r"layers\.(\d+)\..*linear_(qkv|proj|fc1|fc2)\.weight(\d*)$")
_PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",),
}  # fmt: skip

Matrix = tuple[torch.Tensor, torch.Tensor | None]
Linear = tuple[str, torch.Tensor]


def linears(weights: Mapping[str, torch.Tensor]) -> list[Linear]:
    """(kind, weight) of each linear, in the order of the weights."""
    found = ((_LINEAR.search(name), value) for name, value in weights.items())
    return [(match[2], value) for match, value in found if match]


def hf_modules(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The Hugging Face modules of all linears, in the order in which they are converted."""
    found: list[str] = []
    for match in filter(None, map(_LINEAR.search, weights)):
        layer, kind, expert = match.groups()
        block = "self_attn" if kind in ("qkv", "proj") else "mlp"
        inner = f"{block}.experts.{expert}" if expert else block
        found += [f"model.layers.{layer}.{inner}.{part}" for part in _PARTS[kind]]
    return found


def views(value: torch.Tensor, kind: str, groups: int, head: int) -> Sequence[torch.Tensor]:
    """The parts of one weight; rows may be in several dimensions."""
    if kind == "qkv":
        grouped = value.unflatten(0, (groups, -1, head))
        parts: Sequence[torch.Tensor] = grouped.split([grouped.shape[1] - 2, 1, 1], dim=1)
        return parts
    return value.chunk(2) if kind == "fc1" else (value,)


def _copied(part: torch.Tensor, quant_scale: torch.Tensor) -> Matrix:
    return part.clone(memory_format=torch.contiguous_format).flatten(0, -2), None


def _given(part: torch.Tensor, quant_scale: torch.Tensor) -> Matrix:
    scaled = (part.float() * quant_scale).clamp(-LIMIT, LIMIT)
    return scaled.to(E4M3).flatten(0, -2), None


def _blocks(part: torch.Tensor, quant_scale: torch.Tensor) -> Matrix:
    rows, columns = part.numel() // part.shape[-1], part.shape[-1]
    blocks = part.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).float()
    amax = blocks.abs().amax((1, 3))
    dequant_scale = torch.where(amax > 0, amax / LIMIT, 1.0)
    scaled = (blocks / dequant_scale[:, None, :, None]).clamp(-LIMIT, LIMIT)
    return scaled.to(E4M3).view(rows, columns), dequant_scale


CASTS = {"bf16": _copied, "given": _given, "block": _blocks}
Convert = Callable[[torch.Tensor, str, int, int, torch.Tensor], list[Matrix]]


def converter(scheme: str) -> Convert:
    """A function of (weight, kind, query groups, head size, quant_scale)."""
    cast = CASTS[scheme]

    def convert(
        value: torch.Tensor, kind: str, groups: int, head: int, quant_scale: torch.Tensor
    ) -> list[Matrix]:
        return [cast(part, quant_scale) for part in views(value, kind, groups, head)]

    return convert


@cache
def compiled(scheme: str, device: torch.device) -> Convert:
    """The same under torch.compile: static shapes, so one compilation for each of them.

    All who ask share one function, since a process compiles one code for eight shapes at most.
    """
    # On a CPU the benchmarks are only kept alive: no C++ compiler is asked for.
    backend = "inductor" if device.type == "cuda" else "eager"
    made: Convert = torch.compile(converter(scheme), dynamic=False, fullgraph=True, backend=backend)
    return made


def captured(run: Callable[[], list[Matrix]]) -> Callable[[], list[Matrix]]:
    """What has been run before as one CUDA graph: its addresses are fixed."""
    # A graph has memory of its own; what earlier calls left behind may be all the rest.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> list[Matrix]:
        graph.replay()
        return result

    return replay
