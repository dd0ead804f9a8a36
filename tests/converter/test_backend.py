"""Which device a process converts on."""

from __future__ import annotations

import pytest
import torch

from fuseport.converter.backend import default_device
from fuseport.converter.errors import RecipeError


@pytest.mark.parametrize(
    ("gpus", "local", "device", "expected"),
    [
        (4, "3", "auto", "cuda:3"),
        (4, "3", "cuda", "cuda:3"),
        (4, "3", "cuda:1", "cuda:1"),
        (4, None, "auto", "cuda"),
        # Each process was given a GPU of its own by the environment, or they share them.
        (1, "3", "auto", "cuda:0"),
        (2, "3", "auto", "cuda:1"),
        (0, "3", "auto", "cpu"),
        (4, "3", "cpu", "cpu"),
    ],
)
def test_each_local_process_has_its_own_gpu(
    gpus: int, local: str | None, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device(device) == torch.device(expected)


@pytest.mark.parametrize("device", ["cuda:2", "tpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=device):
        default_device(device)
