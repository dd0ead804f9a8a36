"""A parser under atheris, which is guided by the coverage: longer than any test run.

    pip install atheris
    PYTHONPATH=tests/support python -m fuseport_testing.coverage_fuzz PARSER [libFuzzer options]

PARSER is one of `PARSERS`. Ends with a traceback at the first error that is not a named one;
`-max_total_time=3600 -rss_limit_mb=1024 -timeout=30` bounds a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["fuseport.converter.sources"]):
    from fuseport.converter.errors import FuseportError
    from fuseport.converter.sources.safe_pickle import load_pickle
    from fuseport.converter.sources.safetensors_file import read_header
    from fuseport.converter.sources.saved_tensors import load_saved
    from fuseport.converter.sources.te_state import decode_te_state
    from fuseport.converter.sources.torch_zip import Window, find_payload


def _saved() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(5), "b": [1, (2, 3)]}, stream)
    return stream.getvalue()


def _on_disk(read: Callable[[int, int], object]) -> Callable[[bytes], object]:
    """Calls `read` with the descriptor of a file of the bytes, and their number."""

    def run(data: bytes) -> object:
        handle = os.memfd_create("fuzz")
        try:
            os.write(handle, data)
            return read(handle, len(data))
        finally:
            os.close(handle)

    return run


def _state(data: bytes) -> object:
    state = torch.frombuffer(bytearray(data or b"x"), dtype=torch.uint8)
    return decode_te_state(state, "here")


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
# Parser → how bytes are given to it, and good ones to begin with.
PARSERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "pickle": (lambda data: load_pickle(data, "here"), pickle.dumps({"a": [1.5, (2,), None]}, 4)),
    "saved": (lambda data: load_saved(data, "here", 1 << 20), _saved()),
    "zip": (
        _on_disk(lambda handle, size: find_payload(Window(handle, 0, size), "here")),
        _saved(),
    ),
    "safetensors": (
        _on_disk(lambda handle, size: read_header(Path(f"/proc/self/fd/{handle}"))),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(8),
    ),
    "extra_state": (_state, pickle.dumps({"scale_fwd": torch.ones(3)})),
}


def main() -> None:
    """Fuzz one parser until something goes wrong, or libFuzzer's options end it."""
    parse, seed = PARSERS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(FuseportError):
            parse(data)

    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "seed").write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
