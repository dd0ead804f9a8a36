"""GPT-OSS's experts in MXFP4, as its own checkpoints have them: they are read as bf16.

A projection of all experts is two uint8 tensors: `…_blocks` [E, rows, columns / 32, 16] with two
e2m1 codes a byte, the even column low, and `…_scales` [E, rows, columns / 32] in E8M0. Each value
is code · 2^(scale − 127) (OCP Microscaling Formats 1.0), which bf16 holds exactly. The model keeps
the transpose, [E, columns, rows]. Source: `convert_moe_packed_tensors` in transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fuseport.kernels.codecs import MX_COLUMNS, decode_e2m1, decode_e8m0, unpack_e2m1

from ..errors import MissingTensorError, ScaleError, ShapeError
from .dequantised import read_part
from .stored import Stored

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = MX_COLUMNS // 2
_NAN = 0xFF


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Stored):
    """The values in bf16, [E, rows, columns]; has no pieces of its own."""

    blocks: Stored
    scales: Stored

    @property
    def nbytes(self) -> int:
        """Size as stored, in bytes."""
        return self.blocks.nbytes + self.scales.nbytes

    def read_flat(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Reads whole blocks of 32.

        Raises:
            ScaleError: a scale is NaN.
        """
        self._check(start, stop, out)
        if start == stop:
            return
        first, last = start // MX_COLUMNS, -(-stop // MX_COLUMNS)
        packed = read_part(self.blocks, first * _BYTES, last * _BYTES).view(-1, _BYTES)
        scales = read_part(self.scales, first, last)
        if bool((scales == _NAN).any()):
            raise ScaleError(
                f"{self.scales.name}: scale number {first + int((scales == _NAN).nonzero()[0])} is "
                f"NaN; quantise the checkpoint again"
            )
        values = decode_e2m1(unpack_e2m1(packed)) * decode_e8m0(scales)[:, None]
        begin = first * MX_COLUMNS
        out.copy_(values.view(-1)[start - begin : stop - begin])


def is_mxfp4(config: Mapping[str, object], names: Iterable[str]) -> bool:
    """Whether a config.json says that weights are in MXFP4, and some are."""
    said = config.get("quantization_config")
    says = isinstance(said, Mapping) and said.get("quant_method") == METHOD
    return says and any(name.endswith((BLOCKS, SCALES)) for name in names)


def unpacked(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors, each pair of blocks and scales as one of their values, by the name of both.

    Raises:
        MissingTensorError: blocks without scales, or the other way round.
        ShapeError: blocks and scales do not fit together.
    """
    names = {
        name.removesuffix(end) for name in tensors for end in (BLOCKS, SCALES) if name.endswith(end)
    }
    packed = {f"{name}{end}" for name in names for end in (BLOCKS, SCALES)}
    if missing := sorted(packed - tensors.keys()):
        raise MissingTensorError(
            f"{missing[0]} is not there, though the other half of this MXFP4 weight is; copy the "
            f"checkpoint completely"
        )
    plain = {name: one for name, one in tensors.items() if name not in packed}
    return plain | {
        name: _values(name, tensors[name + BLOCKS], tensors[name + SCALES]) for name in names
    }


def _values(name: str, blocks: Stored, scales: Stored) -> Mxfp4:
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, _BYTES)
    if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ShapeError(
            f"{blocks.name} is {blocks.dtype} {list(blocks.shape)} and {scales.name} "
            f"{scales.dtype} {list(scales.shape)}; expected uint8 [E, rows, columns / 32, 16] and "
            f"[E, rows, columns / 32]"
        )
    experts, rows, groups, _ = blocks.shape
    shape = (experts, rows, groups * MX_COLUMNS)
    return Mxfp4(name, shape, torch.bfloat16, (), blocks=blocks, scales=scales)
