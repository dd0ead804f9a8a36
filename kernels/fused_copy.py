"""All moves of a batch in one launch per kind.

A kind is what the compiled code depends on: order of the strides, dtypes, whether accesses can be
16 bytes wide, and the arithmetic. A model usually needs two or three kinds, however many tensors
it has.

Bytes moved: every source and destination byte once, plus 4 bytes of tile table per 4096 elements
or more and 192 bytes per descriptor. Scales computed for a whole tensor, and NVFP4's second scale,
read the source once more, as scales of a transposed source's rows do.

Rejected: tiles of 2048 elements (on an H100 0.73 of the copy into e4m3, where 4096 gave 1.0: the
two table loads are then too large a share of a program), and tiles above 4096 (no gain).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import triton

from .amax_kernel import CLEARED, amax_kernel, clear_kernel
from .kinds import TWO_PASSES
from .move import ALIGNED, Move, distinct_amaxes
from .move_kernel import move_kernel
from .options import amax_constants, constants, has_native_e4m3, kernel_of, resources
from .quant import GivenScale
from .regions import Job, stage
from .repeats import Repeat
from .tables import Ints, Launch, build
from .tally import SLOTS


class FusedCopy:
    """A batch of moves with its tables built: `run` launches, and may be called again.

    The tables hold addresses, so the moves' storages must stay where they are; the moves are
    kept alive. `run` does no host synchronisation and can be captured in a CUDA graph.

    Args:
        moves: any number of moves, all on one device. Destinations must not overlap one another
            or any source. Moves that share a scale, or a matrix with scales, are in one batch.
        repeats: moves that are done over the memory of several times; a batch with such can
            neither count nor merge amaxes.
        native_e4m3: force the hardware or the integer route to e4m3; by default what
            `has_native_e4m3` says.

    Raises:
        ValueError: the moves lie on several devices, or a matrix has gaps.
    """

    def __init__(
        self,
        moves: Sequence[Move],
        repeats: Sequence[Repeat] = (),
        *,
        native_e4m3: bool | None = None,
    ) -> None:
        plain = [one for one in repeats if not one.is_staged()]
        staged = [one for one in repeats if one.is_staged()]
        self.moves = (*moves, *(move for one in staged for move in one.written_out()))
        self.device = _one_device([*self.moves, *(move for one in plain for move in one.moves)])
        self._native = has_native_e4m3(self.device) if native_e4m3 is None else native_e4m3
        gathers, jobs = stage(self.moves)
        repeated = list(_jobs_of(plain, len(self.moves)))
        values = _scale_values(self.moves, plain, self.device)
        self._staged = {job.index for job in gathers}
        # What the tables point to beside the moves' own memory.
        self._kept = [values, plain, [job.move.dst for job in gathers]]
        given = _scale_pointers([*jobs, *(job for own, _ in repeated for job in own)], values)
        self._flags = torch.zeros(len(values), dtype=torch.int32, device=self.device)
        self._gathers = build(gathers, {}, self._flags, self.device)
        launches = build(jobs, given, self._flags, self.device, repeated)
        # The longest first: the host prepares the others while the GPU is busy with it.
        self.launches = tuple(sorted(launches, key=lambda launch: -launch.tiles))
        # What a NaN or an Inf makes a second launch do again.
        self._with_flags = [x for x in self.launches if x.kind.scheme not in ("none", "given")]
        self.amaxes = tuple(distinct_amaxes(self.moves))
        self._has_repeats = bool(repeats)

    def run(
        self,
        *,
        count: bool = False,
        power: torch.Tensor | None = None,
        reduce: Callable[[tuple[torch.Tensor, ...]], object] | None = None,
    ) -> torch.Tensor | None:
        """Launch every kind once, on the current stream.

        Args:
            count: count what is lost.
            power: fp64 [len(moves), 2] on the device, added to: Σx² and Σ(x − dequantised)² of
                each quantised move's finite elements. The sums' last bits are not deterministic.
            reduce: called between the two passes with every group's amax (fp32 [1] each), to
                merge them over ranks in place.

        Returns:
            With `count`, int64 [len(moves), 2] on the device: per move, the finite source
            elements that saturated or overflowed, and those that are NaN or Inf. Moves that had
            to be gathered into one matrix are counted under the first of them.

        Raises:
            ValueError: an option was given that a batch with repeats does not have, or there is
                nothing to launch on.
        """
        if self.device.type != "cuda" and not is_interpreted():
            raise ValueError(
                f"the moves lie on {self.device}, and the kernels run on a GPU; set "
                f"TRITON_INTERPRET=1 before they are imported, or take fused_copy_ref"
            )
        if self._has_repeats and (count or power is not None or reduce is not None):
            raise ValueError("a batch with repeats can neither count nor merge amaxes")
        counters = self._zeros(torch.int64) if count else None
        sums = None if power is None else self._zeros(torch.float64)
        with _on(self.device):
            self._launch(self._gathers, None, None, False)
            self._find_amaxes()
            if reduce is not None and self.amaxes:
                reduce(self.amaxes)
            self._launch(self.launches, counters, sums, False)
            self._launch(self._with_flags, counters, sums, True)
        if power is not None and sums is not None:
            power += self._total(sums)
        return None if counters is None else self._total(counters)

    def follow(self, moves: Sequence[Move]) -> bool:
        """Go on with the same moves, whose sources' storages alone lie elsewhere now.

        The tables' addresses are changed where they are, so a captured graph stays good. Not for a
        batch with repeats.

        Returns:
            False, with nothing changed, if an address is not what it was modulo 16 bytes: other
            code may be needed then.
        """
        assert not self._has_repeats
        pairs = zip(moves, self.moves, strict=True)
        steps = [new.src.data_ptr() - old.src.data_ptr() for new, old in pairs]
        if any(step % ALIGNED for step in steps):
            return False
        # A staged matrix is made of its copies; it stays where it is itself.
        own = [0 if index in self._staged else step for index, step in enumerate(steps)]
        for launches, by in ((self._gathers, steps), (self.launches, own)):
            table = torch.tensor(by, dtype=torch.int64, device="cpu").to(self.device)
            for launch in launches:
                launch.descriptors[:, 1] += table[launch.descriptors[:, 15]]
        self.moves = tuple(moves)
        return True

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """Counters of both launches, spread over slots."""
        return torch.zeros((2, len(self.moves), SLOTS, 2), dtype=dtype, device=self.device)

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """[moves, 2]: of the second launch where it ran, else of the first."""
        first, second = values.sum(2)
        return torch.where(self._flags[:, None] != 0, second, first)

    def _launch(
        self,
        launches: Sequence[Launch],
        counters: torch.Tensor | None,
        sums: torch.Tensor | None,
        careful: bool,
    ) -> None:
        for launch in launches:
            # Without counting the pointers are never read: any tensor will do.
            kind, unused = launch.kind, launch.descriptors
            count, power = counters is not None, sums is not None
            fixed = constants(kind, count, power, self._native, careful)
            kernel_of(kind)[(len(launch.descriptors) if careful else launch.tiles,)](
                launch.descriptors, launch.tile_table,
                unused if counters is None else counters[int(careful)],
                unused if sums is None else sums[int(careful)],
                **fixed, **resources(kind, count or power or careful), enable_fp_fusion=False,
            )  # fmt: skip

    def _find_amaxes(self) -> None:
        if self._with_flags:
            self._flags.zero_()
        two_passes = [one for one in self.launches if one.kind.scheme in TWO_PASSES]
        # Kinds may share a group, so all are cleared before the first one is looked at.
        for launch in two_passes:
            count = len(launch.descriptors)
            clear_kernel[(triton.cdiv(count, CLEARED),)](launch.descriptors, count, CLEARED)
        for launch in two_passes:
            amax_kernel[(launch.tiles,)](
                launch.descriptors, launch.tile_table, **amax_constants(launch.kind), num_warps=4
            )


def fused_copy(
    moves: Sequence[Move],
    *,
    count: bool = False,
    power: torch.Tensor | None = None,
    reduce: Callable[[tuple[torch.Tensor, ...]], object] | None = None,
) -> torch.Tensor | None:
    """Run `moves` on their GPU (or in Triton's interpreter), one launch per kind.

    Twin of `reference.fused_copy_ref`: same arguments, same bits, same counters.
    """
    if not moves:
        return torch.zeros(0, 2, dtype=torch.int64, device="cpu") if count else None
    return FusedCopy(moves).run(count=count, power=power, reduce=reduce)


def _one_device(moves: Sequence[Move]) -> torch.device:
    devices = {tensor.device for move in moves for tensor in (move.dst, move.src)}
    if len(devices) != 1:
        found = sorted(map(str, devices))
        raise ValueError(f"the moves of a batch must lie on one device, found {found}")
    return devices.pop()


def _jobs_of(repeats: Sequence[Repeat], first: int) -> Iterator[tuple[list[Job], Ints]]:
    """The first time's jobs of each, numbered from `first` on, and the other times' steps."""
    for one in repeats:
        yield [Job(first + number, move) for number, move in enumerate(one.moves)], one.steps()
        first += len(one.moves) * len(one.times)


def _scale_values(
    moves: Sequence[Move], repeats: Sequence[Repeat], device: torch.device
) -> torch.Tensor:
    """fp32, for each job: scales given as floats, in one upload; 1.0 where there is none."""
    given = (m.quant.quant_scale if isinstance(m.quant, GivenScale) else 1.0 for m in moves)
    values = [1.0 if isinstance(value, torch.Tensor) else value for value in given]
    for one in repeats:
        scales = [time.quant_scale for time in one.times]
        values += np.repeat(scales, len(one.moves)).tolist()
    host = torch.tensor(values, dtype=torch.float32, device="cpu")
    return host.to(device, non_blocking=True)


def _scale_pointers(jobs: Sequence[Job], values: torch.Tensor) -> dict[int, int]:
    """Where the kernel finds each given scale: the caller's tensor, or the uploaded value."""
    pointers, first = {}, values.data_ptr()
    for job in jobs:
        if isinstance(job.move.quant, GivenScale):
            scale, own = job.move.quant.quant_scale, first + 4 * job.index
            pointers[job.index] = scale.data_ptr() if isinstance(scale, torch.Tensor) else own
    return pointers


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def is_interpreted() -> bool:
    """True if the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when imported)."""
    return not isinstance(move_kernel, triton.runtime.JITFunction)
