"""Stands in for an engine's process: opens the handles that it is sent, and says what it saw."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import torch
import xxhash


def digest(tensor: torch.Tensor) -> str:
    """Of the bytes, dtype and shape."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return (
        f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(flat.numpy().tobytes())}"
    )


def opened(handle: Any, device: int | None) -> torch.Tensor:
    """As TensorRT-LLM's worker does it: a GPU's number is put in as the process knows it."""
    function, arguments = handle
    changed = list(arguments)
    if device is not None:
        changed[6] = device
    tensor: torch.Tensor = function(*changed)
    return tensor


def receive(connection: Connection, uuid: str, device: int | None) -> None:
    """Answer each update when it has been read, and the last with all digests and memory."""
    seen: dict[str, str] = {}
    while (message := connection.recv()) != "stop":
        if message is None:
            free = 0 if device is None else torch.cuda.mem_get_info(device)[0]
            connection.send((seen, free))
            seen = {}
            continue
        for name, handle in message[uuid]:
            assert name not in seen
            seen[name] = digest(opened(handle, device))
        connection.send("read")
