"""The other path: split by torch, then cast each tensor by itself in 128 × 128 blocks.

That is how reinforcement-learning frameworks refit a block-scaled engine. The kernel here is a
plain one of that kind; verl's own file is used beside it where verl is installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton
import triton.language as tl

from fuseport.converter import ModelSpec

Cast = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
LINEAR = re.compile(r"linear_(qkv|proj|fc1|fc2)\.weight\d*$")


@triton.jit
def block_cast_kernel(src, dst, scales, rows, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of 128 × 128: amax, scale, cast."""
    down, across = tl.program_id(0), tl.program_id(1)
    row = down * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = across * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, at = (row < rows) & (column < columns), row.to(tl.int64) * columns + column
    x = tl.load(src + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-10) / 448.0
    tl.store(dst + at, (x / scale).to(tl.float8e4nv), mask=mask)
    tl.store(scales + down * tl.num_programs(1) + across, scale)


def block_cast(src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, dequant_scales) of a contiguous matrix."""
    rows, columns = src.shape
    grid = -(-rows // 128), -(-columns // 128)
    codes = torch.empty_like(src, dtype=torch.float8_e4m3fn)
    scales = torch.empty(grid, dtype=torch.float32, device=src.device)
    block_cast_kernel[grid](src, codes, scales, rows, columns, BLOCK=128, num_warps=8)
    return codes, scales


def verl_cast() -> Cast | None:
    """Verl's cast, loaded from its file alone; None where it is not installed."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "utils" / "kernel" / "fp8_kernel.py"
    spec = importlib.util.spec_from_file_location("verl_fp8_kernel", path)
    if spec is None or spec.loader is None or not path.is_file():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda src: module.scaled_fp8_blockwise(src, [128, 128])


def split(name: str, value: torch.Tensor, spec: ModelSpec) -> Iterator[torch.Tensor]:
    """The Hugging Face matrices of one of Megatron-Core's, contiguous."""
    if "linear_qkv" in name:
        groups = value.unflatten(0, (spec.num_query_groups, -1, spec.kv_channels))
        queries = groups.shape[1] - 2
        for part in groups.split([queries, 1, 1], dim=1):
            yield part.reshape(-1, value.shape[1])
    elif "linear_fc1" in name:
        yield from (half.contiguous() for half in value.chunk(2))
    else:
        yield value


def split_and_cast(weights: Mapping[str, torch.Tensor], spec: ModelSpec, cast: Cast) -> int:
    """Everything tensor by tensor; the number of casts. Results are dropped as an engine would."""
    casts = 0
    for name, value in weights.items():
        if LINEAR.search(name):
            for matrix in split(name, value, spec):
                cast(matrix)
                casts += 1
    return casts
