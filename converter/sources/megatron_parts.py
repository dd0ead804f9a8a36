"""Megatron-Core's fused tensors, taken apart as views."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..logical import Half, Mlp

# Find a part of an MLP by its name in `megatron_names`: where it is expected, or there at all;
# where it must be.
Take = Callable[[str, tuple[int, ...], bool | None], torch.Tensor | None]
Need = Callable[[str, tuple[int, ...]], torch.Tensor]


def split_qkv(tensor: torch.Tensor, groups: int, head: int) -> tuple[torch.Tensor, ...]:
    """[G·(Q+2)·D, …] → q [G, Q, D, …], k [G, D, …], v [G, D, …]."""
    per_group = tensor.unflatten(0, (groups, -1, head))
    queries = per_group.shape[1] - 2
    return per_group[:, :queries], per_group[:, queries], per_group[:, queries + 1]


def gate_and_up(take: Take, need: Need, width: int, hidden: int, bias: bool) -> tuple[Half, Half]:
    """Gate and up of a gated MLP: from one matrix [2F, H], or kept apart (weight_w, weight_v)."""
    gate = take("fc1_gate", (width, hidden), None)
    if gate is not None:
        up = need("fc1_up", (width, hidden))
        gate_bias = take("fc1_gate.bias", (width,), bias)
        return Half(gate, gate_bias), Half(up, take("fc1_up.bias", (width,), bias))
    gate, up = need("fc1", (2 * width, hidden)).chunk(2)
    vector = take("fc1.bias", (2 * width,), bias)
    gate_bias, up_bias = (None, None) if vector is None else vector.chunk(2)
    return Half(gate, gate_bias), Half(up, up_bias)


def experts_first(first: torch.Tensor, halves: int) -> list[tuple[torch.Tensor, ...]]:
    """[E, 2F, H] → for each expert (gate, up), or (up,) where it is not gated."""
    return [expert.chunk(halves) for expert in first.unbind(0)]


def assemble(firsts: list[tuple[torch.Tensor, ...]], down: torch.Tensor) -> tuple[Mlp, ...]:
    """Experts from what `experts_first` gives and their second matrices [E, H, F]."""

    def one(first: tuple[torch.Tensor, ...], second: torch.Tensor) -> Mlp:
        *gate, up = (Half(weight, None) for weight in first)
        return Mlp(gate[0] if gate else None, up, second, None)

    return tuple(one(*pair) for pair in zip(firsts, down.unbind(0), strict=True))
