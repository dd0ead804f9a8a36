"""Megatron-Core's fused tensors, taken apart as views."""

from __future__ import annotations

import torch

from ..logical import Half, Mlp


def split_qkv(tensor: torch.Tensor, groups: int, head: int) -> tuple[torch.Tensor, ...]:
    """[G·(Q+2)·D, …] → q [G, Q, D, …], k [G, D, …], v [G, D, …]."""
    per_group = tensor.unflatten(0, (groups, -1, head))
    queries = per_group.shape[1] - 2
    return per_group[:, :queries], per_group[:, queries], per_group[:, queries + 1]


def gate_and_up(find, width: int, hidden: int, bias: bool) -> tuple[Half, Half]:  # type: ignore[no-untyped-def]
    """Gate and up of a gated MLP: from one matrix [2F, H], or kept apart (weight_w, weight_v)."""
    apart = find("fc1_gate", (width, hidden), None)
    if apart is not None:
        up = find("fc1_up", (width, hidden), True)
        biases = (
            find("fc1_gate.bias", (width,), bias),
            find("fc1_up.bias", (width,), bias),
        )
        return Half(apart, biases[0]), Half(up, biases[1])
    weight = find("fc1", (2 * width, hidden), True)
    vector = find("fc1.bias", (2 * width,), bias)
    weights = weight.chunk(2)
    biases = (None, None) if vector is None else vector.chunk(2)
    return Half(weights[0], biases[0]), Half(weights[1], biases[1])


def experts_first(first: torch.Tensor, halves: int) -> list[tuple[torch.Tensor, ...]]:
    """[E, 2F, H] → for each expert (gate, up), or (up,) where it is not gated."""
    return [expert.chunk(halves) for expert in first.unbind(0)]


def assemble(firsts: list[tuple[torch.Tensor, ...]], down: torch.Tensor) -> tuple[Mlp, ...]:
    """Experts from what `experts_first` gives and their second matrices [E, H, F]."""

    def one(first: tuple[torch.Tensor, ...], second: torch.Tensor) -> Mlp:
        *gate, up = (Half(weight, None) for weight in first)
        return Mlp(gate[0] if gate else None, up, second, None)

    return tuple(one(*pair) for pair in zip(firsts, down.unbind(0), strict=True))
