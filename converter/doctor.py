"""What this machine has for a conversion, and whether a small one works here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .backend import default_device
from .bars import size
from .choices import TARGETS
from .convert import convert_checkpoint
from .demo import write_demo_checkpoint
from .errors import FuseportError, MissingPackageError, OutputError
from .installed import version
from .limits import Limits
from .recipe import Recipe
from .trtllm_package import PACKAGE, needed_version
from .verify import verify_checkpoint

# Bytes of the demo's checkpoint and its result, generously.
_TRIAL_SPACE = 100_000_000
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Finding:
    """One line: a topic, what was found, and what to do about it.

    `state` is "ok", "absent" (something optional), "note" (read the advice) or "fails" (nothing
    can be converted so).
    """

    topic: str
    found: str
    state: str = "ok"
    advice: str = ""


def examine(path: Path) -> list[Finding]:
    """Look at the machine, at the space around `path`, and try a conversion there."""
    return [
        *_software(),
        *_gpus(),
        _memory(),
        _space(path),
        *_extras(),
        _tensorrt_llm(),
        _trial(path),
    ]


def _software() -> Iterator[Finding]:
    yield Finding("fuseport", version("fuseport"))
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    cuda = f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"
    yield Finding("torch", torch.__version__ + cuda)
    found = version("triton")
    if found:
        yield Finding("triton", found)
    else:
        advice = "a GPU is not used without it: pip install triton"
        yield Finding("triton", "not installed", "note", advice)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch can use: conversions run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        text = f"{name}, sm_{major}{minor}, {size(free)} of {size(total)} free"
        yield Finding(f"GPU {number}", text)


def _memory() -> Finding:
    free = free_memory()
    needed = Limits().peak(torch.device("cpu"))
    text = f"{size(free)} free, {len(os.sched_getaffinity(0))} CPUs"
    if free >= needed:
        return Finding("memory", text)
    advice = f"a conversion takes up to {size(needed)}; give less with --host-memory"
    return Finding("memory", text, "note", advice)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the machine's, or what its control group leaves."""
    lines = (root / "proc" / "meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys" / "fs" / "cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _space(path: Path) -> Finding:
    where = existing(path)
    free = shutil.disk_usage(where).free
    if not os.access(where, os.W_OK):
        return Finding("space", f"{where} is not writable", "fails", "choose another directory")
    text = f"{size(free)} free at {where}"
    if free > _TRIAL_SPACE:
        return Finding("space", text)
    return Finding("space", text, "fails", "a result is about as large as its source; free some")


def _extras() -> Iterator[Finding]:
    """Each extra of the package: what of it is installed."""
    known = importlib.metadata.metadata("fuseport")
    needs = known.get_all("Requires-Dist") or []
    for extra in known.get_all("Provides-Extra") or []:
        names = [
            _package(need) for need in needs if re.search(rf"extra == ['\"]{extra}['\"]", need)
        ]
        found = {name: version(name) for name in dict.fromkeys(names) if name != "fuseport"}
        missing = [name for name, number in found.items() if not number]
        text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
        if missing:
            text = f"{text}{'; ' if text else ''}not installed: {', '.join(missing)}"
        yield Finding(f"extra {extra}", text, "absent" if missing else "ok")


def _package(requirement: str) -> str:
    match = _PACKAGE.match(requirement)
    assert match is not None
    return match[0]


def _tensorrt_llm() -> Finding:
    if not version(PACKAGE):
        return Finding("TensorRT-LLM", "not installed", "absent")
    return Finding("TensorRT-LLM", f"{version(PACKAGE)}, reads --target {' and '.join(_read())}")


def _read() -> Iterator[str]:
    """The targets that the installed TensorRT-LLM reads."""
    for target in TARGETS:
        with contextlib.suppress(MissingPackageError):
            needed_version(target)
            yield target


def _trial(path: Path) -> Finding:
    """Convert a small checkpoint and verify it, bit for bit."""
    device = default_device("auto")
    try:
        _try_conversion(existing(path))
    except FuseportError as error:
        return Finding("conversion", f"{type(error).__name__}: {error}", "fails")
    # Whatever the drivers, the compiler or the file system raise: that is what is looked for.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Finding("conversion", reason, "fails", f"on {device}; try --device cpu")
    return Finding("conversion", f"a small model, on {device}: equal to plain torch, bit for bit")


def _try_conversion(directory: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="fuseport-doctor-", dir=directory) as name:
            source, out = Path(name) / "source", Path(name) / "out"
            write_demo_checkpoint(source)
            convert_checkpoint(source, out, Recipe(tp_size=2))
            verify_checkpoint(out, source)
    except OSError as error:
        raise OutputError(f"cannot write in {directory}: {error.strerror or error}") from error
