"""Processes on several GPUs (or CPUs, over gloo): how they start, wait, count bytes and time."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

# Every collective, and every wait for another process's own work, ends by then.
PATIENCE = timedelta(seconds=100)
# NVLink's multicast can take the GPUs of a whole host out of service.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip

Seconds = float


class Traffic:
    """Counts the bytes that this process sends, by standing in for `batch_isend_irecv`.

    The operations are kept, so that they can be timed alone.
    """

    def __init__(self) -> None:
        self.batches: list[list[dist.P2POp]] = []
        self._start = dist.batch_isend_irecv

    def __call__(self, operations: list[dist.P2POp]) -> list[dist.Work]:
        """Keep the operations, and start them."""
        self.batches.append(operations)
        return self._start(operations)

    def bytes_of(self, kind: object) -> int:
        """Bytes of the sends (`dist.isend`) or receives (`dist.irecv`) since `clear`."""
        every = (one for batch in self.batches for one in batch)
        return sum(one.tensor.nbytes for one in every if one.op is kind)

    def repeat(self) -> None:
        """Send all of it once more, with nothing in between."""
        for batch in self.batches:
            for work in self._start(batch):
                work.wait()

    def clear(self) -> None:
        """Forget what was sent, and let its memory go."""
        self.batches.clear()


@dataclass(frozen=True)
class World:
    """The processes, and what was measured of their machine: bytes per second.

    `control` is a gloo group: a process may wait in it while another one's GPU works.
    """

    rank: int
    size: int
    device: torch.device
    store: Store
    control: dist.ProcessGroup
    traffic: Traffic
    repeats: int
    copy: float = 0.0
    ring: float = 0.0

    def say(self, text: str) -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        """Until this process's device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reduced(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        """A value of all processes."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.control)
        return float(tensor)

    def most(self, value: float) -> float:
        """The largest value of a process."""
        return self.reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return self.reduced(value, dist.ReduceOp.SUM)

    def all_say(self, good: bool) -> bool:
        """True if it is true on every process."""
        return self.reduced(float(good), dist.ReduceOp.MIN) == 1.0

    def meet(self) -> None:
        """Wait for all processes, on the host."""
        dist.monitored_barrier(self.control, PATIENCE)

    def seconds(self, run: Callable[[], object]) -> Seconds:
        """Median of a run's time, the slowest process's."""
        return self.most(self.median(run, self.start_together))

    def seconds_alone(self, run: Callable[[], object]) -> Seconds:
        """Median of a run's time on process 0 while the others wait."""
        self.meet()
        own = self.median(run, self.wait) if self.rank == 0 else 0.0
        return self.most(own)

    def start_together(self) -> None:
        """Wait for all processes' devices."""
        dist.barrier()
        self.wait()

    def median(self, run: Callable[[], object], before: Callable[[], None]) -> Seconds:
        """Median of this process's times, a first one left out; `before` is not timed."""
        times = []
        for _ in range(self.repeats + 1):
            before()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def measured(world: World, nbytes: int) -> World:
    """With the bandwidths of a copy on each device, and of a ring: each sends to the next one."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    copy = 2 * nbytes / world.seconds(lambda: target.copy_(source))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def ring() -> None:
        operations = [dist.P2POp(dist.isend, source, after), dist.P2POp(dist.irecv, target, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    speed = nbytes / world.seconds(ring) if world.size > 1 else float("inf")
    world.traffic.clear()
    return dataclasses.replace(world, copy=copy, ring=speed)


def start(store: Store, rank: int, size: int, repeats: int) -> World:
    """Join the other processes: NCCL on GPUs, gloo elsewhere."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE,
        device_id=device if on_gpu else None,
    )  # fmt: skip
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    traffic = Traffic()
    dist.batch_isend_irecv = traffic  # type: ignore[assignment]
    return World(rank, size, device, store, control, traffic, repeats)
