"""Builds one rank's shard of a small Megatron-Core `GPTModel` on the CPU.

Weights come from a generator seeded by the tensor's name in the whole model, so that every
parallel layout of a case is a slicing of the same model. All values are exact in bf16.
"""

from __future__ import annotations

import contextlib
import math
import queue
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from .cases import Case

__all__ = ["build", "megatron_on_cpu", "parallel_state"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )
    from megatron.core.transformer.transformer_layer import TransformerLayer

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "fast_gelu": partial(torch.nn.functional.gelu, approximate="tanh"),
    "squared_relu": squared_relu,
}


class ThreadContext:
    """Stands in for a multiprocessing context: Megatron's writer then uses threads.

    Its own writer forks a child per file, waits for the child without a timeout, and the child
    dies where psutil is not installed.
    """

    Queue = queue.Queue
    JoinableQueue = queue.Queue
    Process = threading.Thread

    def get_context(self, _method: str) -> ThreadContext:
        """Any start method gives threads."""
        return self

    def Manager(self) -> ThreadContext:
        """A manager's queue is a plain queue."""
        return self


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Makes Megatron's calls to CUDA harmless, and its warnings silent, for a while."""
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(torch.cuda, "current_device", lambda: torch.device("cpu")))
        stack.enter_context(patch(torch.cuda, "synchronize", lambda *_: None))
        stack.enter_context(patch(torch.Tensor, "cuda", lambda self, *_, **__: self))
        stack.enter_context(patch(filesystem_async, "mp", ThreadContext()))
        stack.enter_context(patch(filesystem_async, "_results_queue", None))
        stack.enter_context(patch(filesystem_async, "_process_memory", lambda: 0))
        # 0.16.1 names this without having imported it when Transformer Engine is missing.
        stack.enter_context(patch(moe_utils, "te_general_gemm", None, create=True))
        # It takes Transformer Engine to be there whenever its own wrappers can be imported.
        stack.enter_context(patch(multi_latent_attention, "HAVE_TE", False, create=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Some activation functions are compiled, which takes longer than all the rest.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        yield


class PlusOneNorm(torch.nn.Module):
    """LayerNorm or RMSNorm whose weight is stored minus one, which torch's own norms lack."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension."""
        gamma, shape = self.weight + 1, self.weight.shape
        if self.rms:
            return torch.nn.functional.rms_norm(x, shape, gamma, self.eps)
        return torch.nn.functional.layer_norm(x, shape, gamma, self.bias, self.eps)


class LatentCore(torch.nn.Module):
    """Causal attention whose values are of another size than its keys.

    Megatron's own for the CPU has one size; that of Transformer Engine needs a GPU. Projections,
    norms and rotary positions stay Megatron's.
    """

    def __init__(self, softmax_scale: float, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """query, key [S, B, N, K], value [S, B, N, V] → [S, B, N · V]."""
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        scores = q @ k.mT * self.scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return mixed.permute(2, 0, 1, 3).flatten(2)


class ParallelLayer(TransformerLayer):  # type: ignore[misc]
    """Falcon's layer: attention and MLP both read the layer's input, each through its own norm."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [S, B, H] → the same shape, and no cross-attention context."""
        attended, _bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        expanded, _bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + attended + expanded, None


def config_of(case: Case, tp: int, pp: int) -> Any:
    """Megatron's configuration of a case."""
    experts = _expert_config(case) if case.experts else {}
    # An uneven split is given by the first stage's size; the others are equal.
    uneven = pp > 1 and case.layers % pp != 0
    kind = MLATransformerConfig if case.latent else TransformerConfig
    return kind(
        num_layers=case.layers,
        hidden_size=case.hidden,
        ffn_hidden_size=case.ffn,
        num_attention_heads=case.heads,
        num_query_groups=case.query_groups,
        kv_channels=case.kv_channels,
        gated_linear_unit=case.gated,
        activation_func=ACTIVATIONS[case.activation],
        normalization=case.normalization,
        layernorm_zero_centered_gamma=case.zero_centered,
        layernorm_epsilon=case.eps,
        add_bias_linear=case.linear_bias,
        add_qkv_bias=case.qkv_bias,
        qk_layernorm=case.qk_layernorm,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=case.layers // pp + 1 if uneven else None,
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        mtp_num_layers=case.further or None,
        **experts,
        **_latent_config(case),
    )


def _latent_config(case: Case) -> dict[str, Any]:
    """Multi-latent attention, whose class has the base of rotary positions too."""
    return {**dict(case.latent), "rotary_base": case.rotary_base} if case.latent else {}


def _expert_config(case: Case) -> dict[str, Any]:
    return {
        "num_moe_experts": case.experts,
        "moe_router_topk": case.topk,
        "moe_ffn_hidden_size": case.moe_ffn,
        "moe_shared_expert_intermediate_size": case.shared_ffn,
        "moe_shared_expert_gate": case.shared_gate,
        "moe_layer_freq": list(case.moe_layers) if case.moe_layers else 1,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        **dict(case.router),
    }


def build(case: Case, tp: int, pp: int) -> Any:
    """This rank's shard of a case, with its weights filled in.

    torch.distributed and Megatron's groups must be up, inside `megatron_on_cpu`.
    """
    config = config_of(case, tp, pp)
    layers = _layer_spec(case, config)
    further = get_gpt_mtp_block_spec(config, layers, False) if case.further else None
    model = GPTModel(
        config,
        layers,
        mtp_block_spec=further,
        vocab_size=case.padded_vocab,
        max_sequence_length=case.positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope" if case.rope else "learned_absolute",
        rotary_percent=case.rotary_percent,
        rotary_base=case.rotary_base,
        share_embeddings_and_output_weights=case.tied,
    ).eval()
    fill(model, case, tp)
    if case.architecture == "GemmaForCausalLM" and model.pre_process:
        # Training adds this to Megatron-Core, which has no option for it.
        model.embedding.register_forward_hook(lambda _, __, out: out * math.sqrt(case.hidden))
    return model


def _layer_spec(case: Case, config: Any) -> Any:
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=case.normalization
    )
    for layer in spec.layer_specs:
        if case.latent:
            layer.submodules.self_attention.submodules.core_attention = LatentCore
        if case.parallel_attention:
            layer.module = ParallelLayer
        if case.zero_centered:
            layer.submodules.input_layernorm = PlusOneNorm
            layer.submodules.pre_mlp_layernorm = PlusOneNorm
        if case.zero_centered and case.qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = PlusOneNorm
            layer.submodules.self_attention.submodules.k_layernorm = PlusOneNorm
    if case.zero_centered:
        spec.layer_norm = PlusOneNorm
    return spec


def fill(model: Any, case: Case, tp: int) -> None:
    """Fills a shard's parameters with its slices of the whole model's weights."""
    first_layer = model.decoder.layers[0].layer_number - 1
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *_router_biases(model)]:
            axis = _shard_axis(name)
            whole_shape = list(parameter.shape)
            if axis is not None:
                whole_shape[axis] *= tp
            whole = whole_weight(case, _global_name(name, first_layer, case), whole_shape)
            halves = 2 if case.gated and "linear_fc1" in name else 1
            parameter.copy_(_shard(whole, axis, halves, tp, rank))


def _router_biases(model: Any) -> list[tuple[str, torch.Tensor]]:
    """What balances the experts' load is a buffer."""
    return [(name, tensor) for name, tensor in model.named_buffers() if "expert_bias" in name]


def _global_name(name: str, first_layer: int, case: Case) -> str:
    if case.tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"(?<=layers\.)\d+", lambda hit: str(int(hit[0]) + first_layer), name, count=1)


def _shard_axis(name: str) -> int | None:
    if re.search(r"linear_(qkv|fc1)\.|eh_proj|word_embeddings|output_layer", name):
        return 0
    return 1 if re.search(r"linear_(proj|fc2)\.weight", name) else None


def _shard(whole: torch.Tensor, axis: int | None, halves: int, tp: int, rank: int) -> torch.Tensor:
    if axis is None:
        return whole
    pieces = [half.chunk(tp, axis)[rank] for half in whole.chunk(halves, axis)]
    return torch.cat(pieces, axis)


def whole_weight(case: Case, name: str, shape: list[int]) -> torch.Tensor:
    """fp32 values that bf16 holds exactly, the same for the same case, name and shape.

    Norm weights are multiples of 1/64 so that bf16 also holds them plus one.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name}:{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if "layernorm" in name:
        near = 0.0 if case.zero_centered or name.endswith("bias") else 1.0
        return near + (values * 16).round().clamp(-48, 48) / 64
    spread = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
    if "embeddings" in name:
        spread = 1.0
    return (values * spread).bfloat16().float()
