"""A trainer's process hands refitted weights to another one, twenty times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import torch
import torch.multiprocessing as mp
from fuseport_testing.cases import megatron_args
from fuseport_testing.refit_receiver import digest, receive
from fuseport_testing.small_models import State, experts_apart, random_state, small

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.handover import device_uuid, named_tensors, trtllm_updates
from fuseport.converter.refit import Refit

CASE = small(layers=2, hidden=64, heads=4, kv_channels=16, ffn=160, query_groups=2, vocab=50)
SPEC = ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))
RECIPE = Recipe(target="hf", quant="fp8-block")
BUCKET = 20_000
CHANGES = 20
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]


def parameters(device: str) -> State:
    return {name: value.to(device) for name, value in experts_apart(random_state(CASE)).items()}


@contextmanager
def receiver(device: torch.device) -> Iterator[Connection]:
    """Another process, which opens what it is sent."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    number = torch.cuda.current_device() if device.type == "cuda" else None
    process = context.Process(target=receive, args=(theirs, device_uuid(device), number))
    process.start()
    try:
        yield ours
        ours.send("stop")
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


def answer(connection: Connection) -> object:
    assert connection.poll(60), "the other process does not answer"
    return connection.recv()


def hand_over(refit: Refit, connection: Connection) -> tuple[dict[str, str], int]:
    for update in trtllm_updates(refit, BUCKET):
        connection.send(update)
        reply = answer(connection)
    assert isinstance(reply, tuple)
    return reply


def footprint(device: torch.device) -> tuple[int, ...]:
    """What must not grow: GPU memory, and open files, which shared memory is."""
    files = len(os.listdir("/proc/self/fd"))
    if device.type != "cuda":
        return (files,)
    return files, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_sees_the_reference_s_bytes(device: str) -> None:
    state = parameters(device)
    refit = Refit(state, SPEC, RECIPE)
    footprints, frees = [], []
    with receiver(refit.device) as connection:
        for change in range(CHANGES):
            for value in state.values():
                value.copy_(
                    torch.randn(value.shape, generator=torch.Generator().manual_seed(change))
                )
            (expected,) = convert_state_dict(state, SPEC, RECIPE, backend="torch")
            digests = {name: digest(tensor) for name, tensor in expected.items()}
            del expected
            seen, free = hand_over(refit, connection)
            assert seen == digests
            footprints.append(footprint(refit.device))
            frees.append(free)
    # The first rounds fill caches; a few files are on their way at any time.
    for early, late in zip(
        zip(*footprints[2:11], strict=True), zip(*footprints[11:], strict=True), strict=True
    ):
        assert min(late) <= max(early)
    assert min(frees[2:11]) <= max(frees[11:])


def test_a_loader_that_copies_as_it_goes_gets_every_tensor() -> None:
    state = parameters("cpu")
    refit = Refit(state, SPEC, RECIPE)
    loaded = {name: tensor.clone() for name, tensor in named_tensors(refit, BUCKET)}
    (expected,) = convert_state_dict(state, SPEC, RECIPE)
    assert {n: digest(t) for n, t in loaded.items()} == {n: digest(t) for n, t in expected.items()}


def test_updates_end_with_none_and_name_the_device() -> None:
    updates = list(trtllm_updates(Refit(parameters("cpu"), SPEC, RECIPE), BUCKET))
    assert updates[-1] is None
    assert len(updates) > 3
    assert all(update is not None and set(update) == {"cpu"} for update in updates[:-1])
