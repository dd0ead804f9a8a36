"""Conversions over several GPUs: each process has a tensor parallel shard of a Llama-3-70B.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.bench_multigpu [--json FILE]
    torchrun --standalone --nproc-per-node 4 -m benchmarks.bench_multigpu --toy     # gloo, no GPU

tp is the number of processes. Each case is first compared with the one-process result bit for bit,
on a model of `--check-layers` layers of full width, and has no figure where they differ.

1. The drop-in on every rank, split as training has it: no communication. Beside it, the same on one
   GPU while the others rest.
2. The drop-in with half as many KV heads as ranks, and a vocabulary that tp does not divide: rows
   of other ranks travel at each call.
3. A refit to half as many tensor parallel ranks, in bf16 and with fp8 rows, and to whole tensors
   in fp8 blocks: slices travel, and the bytes sent must be those of the plan.
4. A torch_dist directory, converted by all GPUs, and by one.

Times are the slowest process's, and bandwidths of one process: of a copy on its device, and of a
ring in which each process sends to the next. What travels is also timed alone.

Each part has processes of its own, which end when it is over or its time is: a part that fails,
or hangs, leaves the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .models import LLAMA_70B, TOY
from .multigpu_cases import Record, cases, run_case
from .multigpu_directory import run_directory
from .multigpu_world import NO_MULTICAST, World, measured, start

PARTS = (1, 2, 3, 4)
# Seconds: for the others once a process has failed, and between looks at them.
GRACE, GLANCE = 10.0, 0.2


def common_store() -> tuple[Store, int, int]:
    """The launcher's store, this process's number, and how many there are."""
    store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(minutes=2))))
    return store, rank, size


def supervise(options: argparse.Namespace) -> list[Record]:
    """Run each part in a process of its own beside those of the other ranks; all records."""
    store, rank, size = common_store()
    records: list[Record] = []
    # Toys share their processes: most of their time is that of starting.
    groups = [options.parts] if options.toy else [[part] for part in options.parts]
    for parts in groups:
        part = ",".join(map(str, parts))
        with tempfile.TemporaryDirectory(prefix="multigpu") as directory:
            file = Path(directory) / "records"
            problem = _run_part(store, rank, options, part, file)
            if rank == 0 and file.exists():
                records += map(json.loads, file.read_text().splitlines())
        for other in _meet(store, f"end/{part}", rank, size, problem or "", options.limit):
            if rank == 0:
                print(f"part {part} FAILED: {other}", flush=True)
                records.append({"part": part, "failed": other})
    return records


def _run_part(
    store: Store, rank: int, options: argparse.Namespace, part: str, file: Path
) -> str | None:
    """Start a part's process and wait for its end; what went wrong."""
    known = [f"--limit={options.limit}", f"--layers={options.layers}", f"--child={file}"]
    known += [f"--check-layers={options.check_layers}", f"--parts={part}"]
    known += [f"--directory-layers={options.directory_layers}"]
    known += ["--toy"] if options.toy else []
    known += [f"--directory={options.directory}"] if options.directory else []
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_multigpu", *known],
        # The store is there already: rank 0 must not start another one.
        env=os.environ | NO_MULTICAST | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
    )
    deadline = time.monotonic() + options.limit
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(GLANCE)
        if store.check([f"failed/{part}"]):
            deadline = min(deadline, time.monotonic() + GRACE)
    if child.poll() is None:
        child.kill()
        child.wait()
        problem = f"rank {rank} had to be killed"
    elif child.returncode == 0:
        return None
    else:
        problem = f"rank {rank} ended with {child.returncode}"
    store.set(f"failed/{part}", problem)
    return problem


def _meet(store: Store, key: str, rank: int, size: int, text: str, limit: float) -> Iterator[str]:
    """Wait for all ranks; what they have said, unless it is empty."""
    store.set(f"{key}/{rank}", text)
    keys = [f"{key}/{other}" for other in range(size)]
    store.wait(keys, timedelta(seconds=limit + 3 * GRACE))
    return (said for said in (store.get(one).decode() for one in keys) if said)


def work(options: argparse.Namespace) -> None:
    """Some parts, in a process of their own."""
    store, rank, size = common_store()
    store = PrefixStore(f"parts {options.parts}", store)
    world = start(store, rank, size, 2 if options.toy else 10)
    world = measured(world, 1 << (20 if options.toy else 30))
    speeds: Record = {"copy_gb_s": world.copy / 1e9}
    speeds |= {"ring_gb_s": world.ring / 1e9} if size > 1 else {}
    for part, record in (
        (one, found) for one in options.parts for found in _records(world, one, options)
    ):
        _show(world, {"part": part} | speeds | record, options.child)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def _records(world: World, part: int, options: argparse.Namespace) -> Iterator[Record]:
    spec, layers = LLAMA_70B, options.layers
    if options.toy:
        spec, layers = TOY, TOY.num_layers
    if part == 4:
        few = spec.replace(num_layers=min(options.directory_layers, layers))
        with _directory(world, options.directory) as directory:
            yield from run_directory(world, few, directory)
    for case in cases(world, spec, part):
        yield run_case(world, case, min(options.check_layers, layers), layers)


@contextlib.contextmanager
def _directory(world: World, parent: Path | None) -> Iterator[Path]:
    """A new directory that all processes of this machine use, and rank 0 removes."""
    if world.rank == 0:
        world.store.set("directory", tempfile.mkdtemp(prefix="multigpu", dir=parent))
    directory = Path(world.store.get("directory").decode())
    try:
        yield directory
    finally:
        if world.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _show(world: World, record: Record, file: Path) -> None:
    """Print a record on rank 0, and keep it."""
    if world.rank != 0:
        return
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    if not record["right"]:
        print(f"{record['case']}: RED: bits or bytes differ; no figure", flush=True)
        return
    shown = {k: v for k, v in record.items() if k not in ("case", "part", "right")}
    words = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    print(f"{record['case']}: {', '.join(words)}", flush=True)


def machine(options: argparse.Namespace) -> Record:
    """What the figures belong to."""
    gpu = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu else None
    return {
        "machine": options.machine, "processes": int(os.environ["WORLD_SIZE"]),
        "card": torch.cuda.get_device_name(0) if gpu else "cpu", "torch": torch.__version__,
        "triton": _version("triton"), "cuda": torch.version.cuda, "nccl": nccl,
        "python": platform.python_version(), "kernel": platform.release(),
        "command": shlex.join(["-m", "benchmarks.bench_multigpu", *sys.argv[1:]]),
    }  # fmt: skip


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=8, help="timed; as many as fit")
    add("--check-layers", type=int, default=2)
    add("--directory-layers", type=int, default=2, help="of the torch_dist directory")
    add("--directory", type=Path, help="where it is put; three times its size must be free")
    add("--parts", type=lambda text: [int(one) for one in text.split(",")], default=[*PARTS])
    add("--limit", type=float, default=120.0, help="seconds of a part")
    add("--json", type=Path, help="write the results here, too")
    add("--machine", default=platform.node(), help="its name, for the results")
    add("--toy", action="store_true", help="a model for a machine without a GPU")
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check and time all parts; exits with 1 if one failed or was not right."""
    options = parsed()
    if options.child is not None:
        work(options)
        return
    records = supervise(options)
    if os.environ["RANK"] != "0":
        return
    text = json.dumps(machine(options) | {"results": records}, indent=1)
    print(text, flush=True)
    if options.json is not None:
        options.json.write_text(text + "\n")
    if not all(record.get("right") for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
