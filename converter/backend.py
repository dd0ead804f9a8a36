"""Which code runs the moves: Triton on a GPU, or its torch twin anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.reference import fused_copy_ref
from fuseport.kernels.repeats import Repeat

from .choices import BACKENDS
from .errors import RecipeError

Run = Callable[..., "torch.Tensor | None"]
# Merges the groups' amaxes (fp32 [1] each) in place, between finding them and quantising.
Reduce = Callable[[tuple[torch.Tensor, ...]], object]


def choose(backend: str, device: torch.device) -> Run:
    """The function that runs moves on `device`: `fused_copy` or `fused_copy_ref`.

    "auto" takes Triton on a GPU and torch elsewhere.

    Raises:
        RecipeError: an unknown name, or Triton without a GPU (its interpreter, which
            TRITON_INTERPRET=1 asks for, counts as one).
    """
    if backend not in BACKENDS:
        raise RecipeError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return fused_copy_ref
    return _triton(device)


class Copy(Protocol):
    """A batch of moves that is ready to be run, as often as wanted."""

    def run(
        self,
        *,
        count: bool = False,
        power: torch.Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> torch.Tensor | None:
        """Run it on the current stream, without waiting; see `FusedCopy.run`."""
        ...

    def follow(self, moves: Sequence[Move]) -> bool:
        """Take over moves whose sources alone lie elsewhere; False if it must be made anew."""
        ...


class ReferenceCopy:
    """`FusedCopy`'s twin in plain torch."""

    def __init__(self, moves: Sequence[Move], repeats: Sequence[Repeat] = ()) -> None:
        self.moves: Sequence[Move] = [*moves, *(m for one in repeats for m in one.written_out())]

    def run(
        self,
        *,
        count: bool = False,
        power: torch.Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> torch.Tensor | None:
        """Run the moves one after the other."""
        return fused_copy_ref(self.moves, count=count, power=power, reduce=reduce)

    def follow(self, moves: Sequence[Move]) -> bool:
        """Any moves will do."""
        self.moves = moves
        return True


class Make(Protocol):
    """Makes a batch of moves ready."""

    def __call__(self, moves: Sequence[Move], repeats: Sequence[Repeat] = ()) -> Copy:
        """`repeats` are moves that are done over several times' memory; see `FusedCopy`."""
        ...


def copier(backend: str, device: torch.device) -> Make:
    """What makes a batch of moves ready.

    Raises:
        RecipeError: as `choose`.
    """
    if choose(backend, device) is fused_copy_ref:
        return ReferenceCopy
    from fuseport.kernels.fused_copy import FusedCopy

    return FusedCopy


def _triton(device: torch.device) -> Run:
    try:
        from fuseport.kernels.fused_copy import fused_copy, is_interpreted
    except ImportError as error:
        raise RecipeError("backend 'triton' needs the triton package; use 'torch'") from error
    if device.type != "cuda" and not is_interpreted():
        raise RecipeError(
            "backend 'triton' needs a GPU; use backend 'torch' (--backend torch), or 'auto'"
        )
    return fused_copy


def default_device(device: str | torch.device) -> torch.device:
    """ "auto" is this process's GPU where there is one, and the CPU elsewhere.

    Of several processes that torchrun started on one machine, process `LOCAL_RANK` has the GPU of
    that number; where there are fewer GPUs, they are dealt out in turn.

    Raises:
        RecipeError: "cuda" was asked for and there is no GPU, or the name is unknown.
    """
    device = str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdigit() or device == kind):
        raise RecipeError(f"device {device!r} is none of auto, cpu, cuda, cuda:NUMBER")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= count:
        raise RecipeError(
            f"device {device!r}: torch sees {count} GPUs here; use device 'cpu' (--device cpu), or "
            f"'auto'"
        )
    local = os.environ.get("LOCAL_RANK")
    if device == "cuda" and local is not None:
        return torch.device(device, int(local) % count)
    return torch.device(device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the calling thread's current one, for what asks for no device.

    Every thread begins with the first GPU, and calls of the driver take up memory on it.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
