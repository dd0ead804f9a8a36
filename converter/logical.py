"""The hub: a model's weights as zero-copy views with named axes.

Sources produce these, targets lay them out. Axis letters: V vocabulary, H hidden, G query groups
(KV heads), Q query heads per group, D head size, F width of an MLP, E experts, P positions.

In a gated MLP `gate` is the half that goes through the activation function and `up` the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm: weight [n], bias [n] or None; its true weight is `weight + shift`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shift: float


@dataclass(frozen=True)
class Projection:
    """One of q, k, v: weight [G, Q, D, H] (k, v: [G, D, H]), bias without H, or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Attention:
    """Self attention; `out` is [H, G, Q, D]: its columns by the head that they read.

    `sinks` [G, Q] is a logit of each query head that attends to nothing (GPT-OSS).
    """

    q: Projection
    k: Projection
    v: Projection
    out: torch.Tensor
    out_bias: torch.Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """A projection through a low rank R: down [R + r, H], norm over R, up [rows, R].

    The last r rows of `down`, if any, skip norm and `up`: the rotated part of the keys.
    """

    down: torch.Tensor
    norm: Norm
    up: torch.Tensor


@dataclass(frozen=True)
class LatentAttention:
    """Multi-latent attention (DeepSeek): q of low rank or whole, keys and values of low rank.

    Rows of q are, for each head, its unrotated then its rotated part; rows of `kv.up`, for each
    head, its unrotated key then its value. `out` is [H, heads · value size].
    """

    q: LowRank | torch.Tensor
    kv: LowRank
    out: torch.Tensor


@dataclass(frozen=True)
class Linear:
    """A whole block replaced by one matrix [H, H] (Nemotron-NAS)."""

    weight: torch.Tensor


@dataclass(frozen=True)
class Half:
    """One half of an MLP's first matrix: weight [F, H], bias [F] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Mlp:
    """`down [H, F]` after the activation; `gate` is None where the MLP is not gated."""

    gate: Half | None
    up: Half
    down: torch.Tensor
    down_bias: torch.Tensor | None

    @property
    def halves(self) -> tuple[Half, ...]:
        """The first matrix in Megatron's order: gate, then up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Moe:
    """Mixture of experts: router [E, H]; `router_bias` [E] balances the load (DeepSeek).

    `router_linear_bias` [E] is the router's own, as a linear's (GPT-OSS).
    """

    router: torch.Tensor
    router_bias: torch.Tensor | None
    experts: tuple[Mlp, ...]
    shared: Mlp | None
    shared_gate: torch.Tensor | None
    router_linear_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One transformer layer; a part that the layer leaves out is None.

    The `…_out_norm`s come after attention and MLP, before the sum (Gemma 2).
    """

    input_norm: Norm | None
    attention: Attention | LatentAttention | Linear | None
    mlp_norm: Norm | None
    mlp: Mlp | Moe | Linear | None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None


@dataclass(frozen=True)
class Further:
    """A layer behind the last one, which predicts a further token (DeepSeek).

    `join` [H, 2H] takes the normalised embedding of a token, then the normalised hidden state.
    `norm` goes before the output; embedding and output [V, H] are copies, or None.
    """

    layer: Layer
    token_norm: Norm
    hidden_norm: Norm
    join: torch.Tensor
    norm: Norm
    embedding: torch.Tensor | None
    output: torch.Tensor | None


@dataclass(frozen=True)
class Model:
    """A whole model, or one shard of it: embedding [V, H], positions [P, H], output [V, H].

    `output` is None where it is tied to the embedding. Parts that another pipeline stage holds
    are None.
    """

    embedding: torch.Tensor | None
    positions: torch.Tensor | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    output: torch.Tensor | None
    further: tuple[Further, ...] = ()
