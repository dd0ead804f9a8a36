"""Converts a sparse checkpoint of about 40 GB, and says how much memory the process took.

    PYTHONPATH=tests/support python -m fuseport_testing.large DIRECTORY LAYERS [options]

The most private memory is sampled from the system's RssAnon; VmHWM is its own maximum, files of
the page cache that are mapped included. On a GPU, what torch reserved there at most is said too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from .sparse import write_sparse

CODE = """
import atexit, torch
from fuseport.converter.cli import main

def say():
    print(f"on the GPU at most {torch.cuda.max_memory_reserved() / (1 << 20):.0f} MiB")

if torch.cuda.is_available():
    atexit.register(say)
main()
"""


def status(process: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status; empty once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in fields}


def main() -> None:
    """Write, convert, and print the peaks."""
    directory, layers, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    source = directory / "source"
    if not source.exists():
        write_sparse(source, hidden=8192, ffn=28672, layers=layers, vocab=128256)
    begin = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-c", CODE, "convert", source, directory / "out", "--timings", *options]
    )
    peaks: dict[str, int] = {}
    while run.poll() is None:
        found = status(run.pid)
        peaks |= {n: max(found.get(n, 0), peaks.get(n, 0)) for n in ("VmHWM", "RssAnon")}
        time.sleep(0.05)
    size = sum(one.stat().st_size for one in (directory / "out").glob("*.safetensors"))
    print(f"exit {run.returncode}, {size / 1e9:.1f} GB in {time.monotonic() - begin:.0f} s")
    for name, peak in peaks.items():
        print(f"{name} at most {peak / (1 << 20):.0f} MiB")


if __name__ == "__main__":
    main()
