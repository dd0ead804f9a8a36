"""The fp8 scales in a Transformer Engine module's `_extra_state`, without Transformer Engine.

| version    | what `_extra_state` is                                                   |
| ---------- | ------------------------------------------------------------------------ |
| up to 1.13 | BytesIO of a torch.save file                                             |
| 1.14       | uint8 tensor of a pickle; like the older ones with `scale_inv`           |
| 2.0 – 2.17 | uint8 tensor of a pickle with the recipe and without `scale_inv`;        |
|            | scales only under delayed scaling; since 2.8 empty for a module in bf16  |
| 2.18       | empty unless the scaling is delayed                                      |

Source: `get_extra_state` in `transformer_engine/pytorch/module/base.py` of these versions.

A module keeps three scales for each of its matrix multiplications ("gemm"): input, weight,
output. In what order depends on module and version. `GroupedLinear` up to 2.2 has all inputs,
then all weights, then all outputs (`view(3, -1)[:, gemm]`); since 2.3 it has input, weight, output
of the first gemm, then of the next (`view(-1, 3)[gemm]`), as `LayerNormMLP` always had. The state
does not name its version, but it shows the order: outputs stay in bf16, so their amax history is
all zeros, while that of a weight never is. Only one of the orders fits that; if none does, scales
are refused rather than guessed.

Megatron-Core cuts a grouped linear's state into one for each expert when it writes a distributed
checkpoint, always with `view(3, -1)[:, gemm]`. From 2.3 on that mixes up inputs, weights and
outputs of different experts; joining the pieces again (`join`) undoes it exactly.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CorruptSourceError, ScaleError, SourceError, UnsupportedOptionError
from .safe_pickle import Inert
from .saved_tensors import Saved, load_saved

# A history of 1024 steps for 128 experts takes 1.5 MiB.
MAX_STATE_BYTES = 64 * 2**20
BY_KIND, BY_GEMM = "by_kind", "by_gemm"
_INPUT, _WEIGHT, _OUTPUT = range(3)
# A byte entry of a checkpoint holds a BytesIO that holds a torch.save file.
_MAX_NESTING = 3


@dataclass(frozen=True)
class TeState:
    """A module's forward scales, fp32.

    scale_fwd [3·gemms]: quant_scales, which multiply before the cast.
    scale_inv_fwd [3·gemms]: dequant_scales; 1 / scale_fwd where the version keeps none.
    amax_history_fwd [steps, 3·gemms].
    """

    scale_fwd: torch.Tensor
    scale_inv_fwd: torch.Tensor
    amax_history_fwd: torch.Tensor
    where: str

    @property
    def gemms(self) -> int:
        """The number of matrix multiplications: the local experts of a grouped linear."""
        return self.scale_fwd.numel() // 3

    def weight(self, gemm: int = 0) -> float:
        """The dequant_scale of a weight; raises as `input` does."""
        return self._checked(_WEIGHT, gemm)

    def input(self, gemm: int = 0) -> float:
        """The dequant_scale of an activation.

        An amax of 0, inf or NaN leaves Transformer Engine's earlier scale in place, so a scale
        is good whatever the history says, unless it is still the first one.

        Raises:
            ScaleError: the scale was never set, is not finite, normal and positive, or the order
                of the scales is not known.
        """
        return self._checked(_INPUT, gemm)

    def _checked(self, kind: int, gemm: int) -> float:
        index = int(self._places()[kind, gemm])
        quant, dequant = float(self.scale_fwd[index]), float(self.scale_inv_fwd[index])
        name = f"{self.where}: the scale of {('the input', 'the weight')[kind]} of gemm {gemm}"
        tiny = torch.finfo(torch.float32).tiny
        for scale in (quant, dequant):
            if not tiny <= scale < float("inf"):
                raise ScaleError(
                    f"{name} is {scale}, expected a finite, normal and positive number; the "
                    f"module was never run in fp8 or training diverged: give the scale yourself"
                )
        if quant == 1.0 and not self.amax_history_fwd[:, index].any():
            raise ScaleError(
                f"{name} was never set: it is 1 and no amax was recorded; give the scale yourself"
            )
        return dequant

    def _places(self) -> torch.Tensor:
        """[3, gemms]: where the scale of a kind and gemm is."""
        places = torch.arange(3 * self.gemms, device="cpu")
        return places.view(3, -1) if self._order() == BY_KIND else places.view(-1, 3).T

    def _order(self) -> str:
        if self.gemms == 1:
            return BY_GEMM
        seen = self.amax_history_fwd.ne(0).any(0)
        fits = [
            name
            for name, view in ((BY_KIND, seen.view(3, -1)), (BY_GEMM, seen.view(-1, 3).T))
            if view[_WEIGHT].all() and not view[_OUTPUT].any()
        ]
        if len(fits) != 1:
            raise ScaleError(
                f"{self.where}: the order of {self.gemms} × 3 scales ({BY_KIND} up to Transformer "
                f"Engine 2.2, {BY_GEMM} since) does not show in the amax history; give the scales "
                f"yourself"
            )
        return fits[0]


def decode_te_state(state: object, where: str) -> TeState | None:
    """Decode an `_extra_state`.

    Args:
        state: a BytesIO, bytes, a uint8 tensor, the inert twin of a BytesIO, None, or empty.
        where: names the state in errors.

    Returns:
        The scales, or None if the state holds none: a module in bf16, or another scaling.

    Raises:
        UnsafeSourceError: it asks for code to run; nothing is run.
        CorruptSourceError: it is damaged, too big, or its parts do not fit together.
        UnsupportedOptionError: it is a fused operation's state.
        SourceError: it is something else.
    """
    for _ in range(_MAX_NESTING):
        data = _bytes(state, where)
        if not data:
            return None
        saved = load_saved(data, where, MAX_STATE_BYTES)
        state = _unwrapped(saved)
        if isinstance(state, Mapping):
            return _state(saved, state)
    raise CorruptSourceError(f"{where}: a state within a state within a state")


def _bytes(state: object, where: str) -> bytes:
    if state is None:
        return b""
    if isinstance(state, Inert) and state.path == "_io.BytesIO":
        state = _contents(state)
    if isinstance(state, io.BytesIO):
        state = state.getbuffer()
    if isinstance(state, torch.Tensor) and state.dtype is torch.uint8:
        state = state.detach().cpu().numpy().data
    if not isinstance(state, (bytes, bytearray, memoryview)):
        raise SourceError(
            f"{where}: expected the bytes of a module's state, found {type(state).__name__}"
        )
    size = memoryview(state).nbytes
    if size > MAX_STATE_BYTES:
        raise CorruptSourceError(f"{where}: {size} bytes; at most {MAX_STATE_BYTES} are read")
    return memoryview(state).tobytes()


def _unwrapped(saved: Saved) -> object:
    """A dict or bytes as they are; a tensor that was saved."""
    value = saved.value
    if isinstance(value, Inert) and value.path != "_io.BytesIO":
        return saved.tensor(value)
    return value


def _contents(buffer: Inert) -> object:
    """What an inert BytesIO would hold."""
    data = buffer.state[0] if isinstance(buffer.state, tuple) and buffer.state else None
    # Protocol 2 has no bytes: it asks for a text to be encoded.
    if isinstance(data, Inert) and data.path == "_codecs.encode" and data.args:
        text = data.args[0]
        return text.encode("latin1", "replace") if isinstance(text, str) else None
    return data


def _state(saved: Saved, state: Mapping[Any, Any]) -> TeState | None:
    if "scale_fwd" not in state:
        if "forward" in state:
            raise UnsupportedOptionError(
                f"{saved.where}: the state of a fused operation; only those of linears are read"
            )
        return None
    scale = _fp32(saved, state, "scale_fwd")
    inverse = _fp32(saved, state, "scale_inv_fwd") if "scale_inv_fwd" in state else 1.0 / scale
    found = TeState(scale, inverse, _fp32(saved, state, "amax_history_fwd"), saved.where)
    _check(found, state.get("extra_fp8_variables"))
    return found


def _fp32(saved: Saved, state: Mapping[Any, Any], key: str) -> torch.Tensor:
    if key not in state:
        raise CorruptSourceError(f"{saved.where}: {key} is missing")
    tensor = saved.tensor(state[key])
    if tensor.dtype is not torch.float32:
        raise CorruptSourceError(f"{saved.where}: {key} is {tensor.dtype}, expected torch.float32")
    return tensor


def _check(state: TeState, variables: object) -> None:
    count = state.scale_fwd.numel()
    gemms = variables.get("num_gemms") if isinstance(variables, dict) else None
    fits = (
        state.scale_fwd.shape == state.scale_inv_fwd.shape == (count,)
        and state.amax_history_fwd.ndim == 2
        and state.amax_history_fwd.shape[1] == count
        and count > 0
        and count == 3 * (gemms if type(gemms) is int else state.gemms)
    )
    if not fits:
        raise CorruptSourceError(
            f"{state.where}: expected three scales for each gemm, found scale_fwd "
            f"{list(state.scale_fwd.shape)}, scale_inv_fwd {list(state.scale_inv_fwd.shape)}, "
            f"amax_history_fwd {list(state.amax_history_fwd.shape)}; the state is damaged"
        )


def join(pieces: Sequence[TeState]) -> TeState:
    """A grouped linear's state from the pieces that Megatron-Core cut it into, in their order.

    Raises:
        CorruptSourceError: a piece is of more than one gemm, or histories differ in length.
    """
    first = pieces[0]
    steps = {len(piece.amax_history_fwd) for piece in pieces}
    if len(steps) > 1 or any(piece.gemms > 1 for piece in pieces):
        raise CorruptSourceError(
            f"{first.where}: pieces of one grouped linear with {sorted(steps)} steps of history "
            f"and {[piece.gemms for piece in pieces]} gemms do not belong together"
        )
    return replace(
        first,
        scale_fwd=torch.stack([piece.scale_fwd for piece in pieces], 1).flatten(),
        scale_inv_fwd=torch.stack([piece.scale_inv_fwd for piece in pieces], 1).flatten(),
        amax_history_fwd=torch.stack([p.amax_history_fwd for p in pieces], 2).flatten(1),
    )
