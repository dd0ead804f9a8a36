"""Other ways to do the same work, each from the same weights in the same process.

A peer converts a layer's linear weights from Megatron-Core's layout to matrices as the Hugging Face
layout has them. `PEERS` says which schemes it knows, how it is made ready and how its result
is read for the check. A peer that is not installed, or fails to start, is skipped by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from fuseport.converter import ModelSpec

from . import megatron_peer
from .plain_torch import E4M3, Matrix, captured, compiled, converter, hf_modules, linears, views
from .work import QUANT_SCALE, Work

Cast = Callable[[torch.Tensor], Matrix]
Call = Callable[[], Any]
Read = Callable[[Work, Any], Sequence[Matrix]]


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


def block_cast(src: torch.Tensor) -> Matrix:
    """(codes, dequant_scales) of a contiguous matrix: a plain kernel of verl's kind."""
    rows, columns = src.shape
    grid = -(-rows // 128), -(-columns // 128)
    codes = torch.empty_like(src, dtype=E4M3)
    scales = torch.empty(grid, dtype=torch.float32, device=src.device)
    block_cast_kernel[grid](src, codes, scales, rows, columns, BLOCK=128, num_warps=8)
    return codes, scales


def _module_of(package: str, *parts: str) -> ModuleType:
    """A module loaded from its file alone: the package itself may need much more."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0], *parts)
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl_cast() -> Cast:
    """Verl's block cast."""
    module = _module_of("verl", "utils", "kernel", "fp8_kernel.py")
    return lambda matrix: module.scaled_fp8_blockwise(matrix, [128, 128])


def transformers_cast() -> Cast:
    """Transformers' own quantiser of 128 × 128 blocks."""
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    operation = module.Fp8Quantize(SimpleNamespace(quantization_config=config))

    def cast(matrix: torch.Tensor) -> Matrix:
        made = operation.convert({"a.weight": matrix})
        return made["a.weight"], made["a.weight_scale_inv"]

    return cast


def torchao_cast() -> Cast:
    """Torchao's block cast for training, which stores by columns."""
    module = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    cast: Cast = module.triton_fp8_blockwise_weight_quant_rhs
    return cast


def matrices(kind: str, value: torch.Tensor, spec: ModelSpec) -> list[torch.Tensor]:
    """The contiguous matrices of one weight, made as frameworks make them: a reshape a part."""
    parts = views(value, kind, spec.num_query_groups, spec.kv_channels)
    return [part.reshape(-1, value.shape[-1]).contiguous() for part in parts]


def split_and_cast(work: Work, cast: Cast) -> Call:
    """Split by torch, then one cast for each matrix."""
    pairs = linears(work.weights)
    return lambda: [cast(m) for kind, value in pairs for m in matrices(kind, value, work.spec)]


def by_tensor(work: Work, convert: Callable[..., list[Matrix]]) -> Call:
    """`plain_torch`'s conversion, tensor by tensor."""
    spec, pairs = work.spec, linears(work.weights)
    scale = torch.tensor([QUANT_SCALE], device=work.device)
    groups, head = spec.num_query_groups, spec.kv_channels
    return lambda: [
        one for kind, value in pairs for one in convert(value, kind, groups, head, scale)
    ]


def in_graph(work: Work) -> Call:
    """torch.compile's result in one CUDA graph."""
    run = by_tensor(work, compiled(work.scheme, work.device))
    for _ in range(2):
        run()
    return captured(run)


def megatron(work: Work) -> Call:
    """Megatron-Core's converter; its results stay on the device."""
    if work.whole is None:
        raise ImportError("Megatron-Core's distributed converter refuses experts")
    scale = QUANT_SCALE if work.scheme == "given" else None
    whole, size = work.whole
    return megatron_peer.converter(dict(work.weights), whole, size, scale, work.device)


def read_megatron(work: Work, found: dict[str, torch.Tensor]) -> list[Matrix]:
    """TensorRT-LLM's tensors as Hugging Face's matrices."""
    spec, result = work.spec, []
    rows = [n * spec.kv_channels for n in (spec.num_attention_heads, *[spec.num_query_groups] * 2)]
    for layer in range(spec.num_layers):
        at = f"transformer.layers.{layer}"
        result += found[f"{at}.attention.qkv.weight"].split(rows)
        names = ("attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
        result += [found[f"{at}.{name}.weight"] for name in names]
    return [(one, None) for one in result]


def as_is(work: Work, found: Sequence[Matrix]) -> Sequence[Matrix]:
    """What a peer gives is what is compared."""
    return found


@dataclass(frozen=True)
class Peer:
    """One way. `exact`: every bit must be ours; else a code may be the next one.

    A peer divides, or multiplies by a reciprocal, as it likes: then a few codes differ.
    """

    schemes: tuple[str, ...]
    make: Callable[[Work], Call]
    read: Read = as_is
    exact: bool = False
    needs_gpu: bool = False
    rounds: int = 5


ALL = ("bf16", "given", "block")
PEERS: dict[str, Peer] = {
    "Megatron-Core": Peer(("bf16", "given"), megatron, read_megatron, exact=True),
    "verl": Peer(("block",), lambda w: split_and_cast(w, verl_cast()), needs_gpu=True, rounds=10),
    "block cast": Peer(
        ("block",), lambda w: split_and_cast(w, block_cast), needs_gpu=True, rounds=10
    ),
    "Fp8Quantize": Peer(("block",), lambda w: split_and_cast(w, transformers_cast())),
    "torchao": Peer(("block",), lambda w: split_and_cast(w, torchao_cast()), needs_gpu=True),
    # (On a GPU torch divides by a number by way of its reciprocal.)
    "eager": Peer(ALL, lambda w: by_tensor(w, converter(w.scheme))),
    "torch.compile": Peer(ALL, lambda w: by_tensor(w, compiled(w.scheme, w.device)), rounds=10),
    "torch.compile, CUDA graph": Peer(ALL, in_graph, needs_gpu=True, rounds=20),
}


def own_matrices(work: Work) -> list[Matrix]:
    """Fuseport's result, which has been checked."""
    (found,) = work.outputs()
    return [
        (found[f"{module}.weight"], found.get(f"{module}.weight_scale_inv"))
        for module in hf_modules(work.weights)
    ]


def apart(found: Sequence[Matrix], expected: Sequence[Matrix], exact: bool) -> float | None:
    """The share of codes that differ; None if more differs than may."""
    if len(found) != len(expected):
        return None
    differing = total = 0
    for (codes, scales), (own_codes, own_scales) in zip(found, expected, strict=True):
        most, count = _steps(codes, own_codes)
        if most > (0 if exact else 1) or not _close(scales, own_scales):
            return None
        differing, total = differing + count, total + codes.numel()
    return differing / total


def _steps(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """(the most codes between two elements, the number of elements that differ)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return 256, one.numel()
    if one.dtype is not E4M3:
        count = int((one.contiguous().view(torch.int16) != other.view(torch.int16)).sum())
        return 256 * min(count, 1), count
    # Equal codes are the rule, and then nothing wider than a byte is made.
    bits = [codes.contiguous().view(torch.uint8).view(-1) for codes in (one, other)]
    differ = (bits[0] != bits[1]).nonzero().view(-1)
    first, second = (_order(each[differ]) for each in bits)
    return (int((first - second).abs().max()) if differ.numel() else 0), differ.numel()


def _order(bits: torch.Tensor) -> torch.Tensor:
    """e4m3 codes as numbers that count the steps between them; both zeros are one."""
    wide = bits.int()
    return torch.where(wide > 127, 128 - wide, wide)


def _close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Scales that are equal to a few units in the last place; where a peer has some."""
    return one is None or other is None or torch.allclose(one, other, rtol=1e-6, atol=0.0)
