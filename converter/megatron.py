"""Drop-in for `megatron.core.export.trtllm`'s weight converters.

    from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter

The classes take what Megatron-Core's take and fill `trtllm_model_weights` with the same tensors
under the same names, through the project's one path: logical views, rules, one launch a kind.
Where the reference is known to be wrong, they are right instead; the documentation lists where.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import collector
from .arguments import check_given, check_kinds, check_state
from .backend import copier
from .claims import LenientClaims
from .errors import RecipeError
from .exchange import Rows, exchange_rows, kv_ranges, vocabulary_ranges
from .host_output import Block, HostOutput, places_of
from .megatron_base import (
    WeightsConverter,
    addresses,
    check_call,
    chunks_of,
    quantised,
    share_memory,
    str_dtype_to_torch,
)
from .megatron_single import SingleDeviceTRTLLMModelWeightsConverter
from .model import ModelSpec
from .parallel import Parallel, current_parallel
from .plan import build, moves_of, on_meta
from .recipe import Recipe
from .shared_amax import reducer
from .sources.megatron import read_model
from .stages import gather_stage
from .state import plan_memory, run_plan, tensors_of, weights
from .targets.trtllm_config import pp_layers
from .trtllm_layers import MODULES, to_megatron

__all__ = [
    "DistributedTRTLLMModelWeightsConverter",
    "Parallel",
    "SingleDeviceTRTLLMModelWeightsConverter",
    "str_dtype_to_torch",
]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
QKV = re.compile(r"^decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.(weight|bias)$")
POSITIONS = "embedding.position_embeddings.weight"


class DistributedTRTLLMModelWeightsConverter(WeightsConverter):
    """Converts each rank's shard of a model that is split as the target wants it, on its device.

    Args:
        transformer_config: Megatron's TransformerConfig (or an object with its fields).
        dtype: the target's dtype: see `str_dtype_to_torch`.
        multi_query_mode: one KV head, where the configuration does not say how many.
        activation: TensorRT-LLM's name; "swiglu", "geglu" and their fast forms are gated.
        scales: `{module}.weights_scaling_factor` → `{"trt_llm_scale": …, "weight_multiplier": …}`;
            the module's weight becomes e4m3.
        parallel: the rank's place. By default Megatron's `parallel_state`.
        output: "host" puts the results into one block of host memory, safe to read when `convert`
            returns; "cuda" leaves them where the state dict is.
        consume: empty the caller's state dict as its tensors are used.
        backend: "auto", "triton" or "torch".
        quantisation: a recipe whose `quant`, `exclude` and `scales` say how linear weights without
            given `scales` are quantised; modules have their target names, layers numbered from the
            stage's first. A scale of a whole weight is found over all tensor-parallel ranks.

    Raises:
        RecipeError: sizes that do not go together, or an unknown dtype or output.
    """

    def __init__(
        self,
        transformer_config: Any,
        dtype: Any,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        scales: Mapping[str, Any] | None = None,
        *,
        parallel: Parallel | None = None,
        output: str = "host",
        consume: bool = False,
        backend: str = "auto",
        quantisation: Recipe | None = None,
    ) -> None:
        super().__init__(transformer_config, dtype, multi_query_mode, activation, scales, backend)
        self._quantised = quantised(Recipe() if quantisation is None else quantisation)
        check_given(parallel=parallel)
        check_kinds(consume=consume)
        if output not in ("host", "cuda"):
            raise RecipeError(f"output {output!r} is neither 'host' nor 'cuda'")
        place = parallel or current_parallel()
        self.parallel, self.output, self.consume = place, output, consume
        self._block = Block()
        self._planned_for: Sequence[object] = ()
        self._run: Callable[[], dict[str, torch.Tensor]] = dict
        self._results: dict[str, torch.Tensor] = {}
        self.inference_tp_size, self.tp_rank = place.tp_size, place.tp_rank
        self.inference_pp_size, self.pp_rank = place.pp_size, place.pp_rank
        self.tp_group: dist.ProcessGroup | None = place.tp_group

    @torch.inference_mode(False)
    @torch.no_grad()
    def convert(
        self,
        model_state_dict: dict[str, Any] | Sequence[dict[str, Any]],
        trtllm_conversion_dict: Mapping[str, Any],
        tokenizer_vocab_size: int,
    ) -> None:
        """Fill `trtllm_model_weights` from a rank's state dict, or from its chunks' state dicts.

        Collective over the tensor parallel group where rows of other ranks are needed: if the
        vocabulary without padding is not split as the padded one was, or tp exceeds the KV heads;
        and where ranks share a scale that is computed.
        Collective over the pipeline group for chunks on several pipeline ranks.

        Args:
            model_state_dict: the rank's tensors, layers numbered from 0 in its pipeline stage. Or,
                for interleaved pipelines, those of each virtual chunk in order, layers numbered
                from 0 in the chunk.
            trtllm_conversion_dict: names without layer numbers → `TRTLLMLayers`.
            tokenizer_vocab_size: the vocabulary without padding.

        Raises:
            FuseportError: see `errors`.
        """
        chunks, one = chunks_of(model_state_dict, self.consume)
        check_call(trtllm_conversion_dict, tokenizer_vocab_size)
        key = (one, tokenizer_vocab_size, dict(trtllm_conversion_dict), *map(addresses, chunks))
        if self._planned_for != key:
            # What is begun may not come to its end.
            self._planned_for = ()
            for chunk in chunks:
                check_state(chunk)
            named = self._stage(chunks, one, trtllm_conversion_dict)
            tensors = self._own_rows(named, trtllm_conversion_dict, tokenizer_vocab_size)
            self._prepare(tensors, trtllm_conversion_dict)
            # What came from other ranks must come again the next time, on all ranks alike.
            kept = (one or self.inference_pp_size == 1) and share_memory(tensors, named)
            self._planned_for = key if kept else ()
        self._results = self._run()
        self.trtllm_model_weights |= self._results
        if self.consume:
            for chunk in chunks:
                chunk.clear()
            self._planned_for, self._run = (), dict

    def _stage(
        self, chunks: Sequence[dict[str, Any]], one: bool, conversion: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The stage's tensors by Megatron's names; `one` dict is a stage already."""
        if one:
            return to_megatron(weights(chunks[0]), conversion)
        named = [to_megatron(tensors_of(chunk), conversion) for chunk in chunks]
        return gather_stage(named, self.facts(conversion).num_layers, self.parallel)

    @collector.paused()
    def _prepare(self, tensors: Mapping[str, torch.Tensor], conversion: Mapping[str, Any]) -> None:
        """Plan, and keep the plan: it runs again as long as the tensors stay where they are."""
        spec = self._shard_facts(conversion)
        recipe = self.recipe(use_parallel_embedding=True, **self._quantised)
        device = next(iter(tensors.values())).device
        # What shares a scale is filled at once, and so not through windows.
        through_windows = self.output == "host" and recipe.quant == "none"
        model, scales = read_model(tensors, spec, LenientClaims), self.given_scales(device)
        allocate = on_meta if through_windows else None
        plan = plan_memory(tensors, model, spec, recipe, scales, allocate)
        make = copier(self.backend, device)
        if through_windows:
            # Now, so that it is populated while the rest is made ready.
            self._block.reserve(places_of(plan)[1])
            self._forget()
            host, names = HostOutput(plan, make, device, self._block), [one.name for one in plan]
            self._run = lambda: dict(zip(names, host.run(), strict=True))
            return
        copy, reduce = make(moves_of(plan)), reducer(plan, self.parallel)
        results = {planned.name: planned.dst for planned in plan}
        self._forget()

        def run() -> dict[str, torch.Tensor]:
            copy.run(reduce=reduce)
            return {name: self._brought(tensor) for name, tensor in results.items()}

        self._run = run

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result where `output` wants it."""
        return tensor.cpu() if self.output == "host" else tensor

    def _forget(self) -> None:
        """A dict without an earlier plan's results: their memory is about to be used again."""
        old = self._results
        kept = {n: t for n, t in self.trtllm_model_weights.items() if t is not old.get(n)}
        self.trtllm_model_weights, self._results = kept, {}

    def _own_rows(
        self, tensors: dict[str, torch.Tensor], conversion: Mapping[str, Any], vocab_size: int
    ) -> dict[str, torch.Tensor]:
        """The tensors with just this rank's rows of the target."""
        tp, result = self.inference_tp_size, dict(tensors)
        share = -(-vocab_size // tp)
        for name in (EMBEDDING, OUTPUT):
            if name in tensors:
                wanted = vocabulary_ranges(vocab_size, tp)
                result[name] = self._exchange(tensors[name], wanted, share)
        if POSITIONS in tensors:
            result[POSITIONS] = tensors[POSITIONS].chunk(tp)[self.tp_rank]
        return result | self._own_heads(tensors, conversion)

    def _own_heads(
        self, tensors: Mapping[str, torch.Tensor], conversion: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """linear_qkv of layers with fewer KV heads than there are ranks.

        As if the rank's query heads and its (repeated) KV head were a model.
        """
        spec, place, tp = self.facts(conversion), self.parallel, self.inference_tp_size
        layers = pp_layers(spec.num_layers, place.pp_size, place.pp_rank)
        rows = (spec.num_attention_heads // tp + 2) * spec.kv_channels
        result = {}
        for name, tensor in tensors.items():
            match = QKV.match(name)
            # One that no stage has is left to be named as unknown.
            if match is None or int(match[1]) >= len(layers):
                continue
            groups = spec.block(layers[int(match[1])]).num_query_groups
            if groups < tp:
                heads = spec.num_attention_heads
                wanted = kv_ranges(heads, groups, spec.kv_channels, tp, name)
                result[name] = self._exchange(tensor, wanted, rows)
        return result

    def _exchange(self, tensor: torch.Tensor, wanted: list[list[Rows]], rows: int) -> torch.Tensor:
        return exchange_rows(tensor, wanted, rank=self.tp_rank, rows=rows, group=self.tp_group)

    def _shard_facts(self, conversion: Mapping[str, Any]) -> ModelSpec:
        place, spec = self.parallel, self.facts(conversion)
        layers = pp_layers(spec.num_layers, place.pp_size, place.pp_rank)
        tp, experts = place.tp_size, place.tp_size // place.ep_size
        return spec.replace(
            num_layers=len(layers),
            num_attention_heads=spec.num_attention_heads // tp,
            num_query_groups=max(spec.num_query_groups // tp, 1),
            ffn_hidden_size=spec.ffn_hidden_size // tp,
            moe_ffn_hidden_size=spec.moe_ffn_hidden_size // experts,
            num_local_experts=spec.num_moe_experts // place.ep_size,
            moe_shared_expert_intermediate_size=spec.moe_shared_expert_intermediate_size // tp,
            moe_layers=tuple(spec.is_moe(layer) for layer in layers),
            blocks=tuple(
                spec.blocks[layer].shard(tp, spec.hidden_size) for layer in layers if spec.blocks
            ),
        )

    # The reference's own method names: doors to the same path for one tensor at a time.

    def _add_to_trtllm_model_weights(self, val: torch.Tensor, layer_name: str) -> None:
        """Store one tensor; a matrix [in, out], or [in, …], is stored as [out, in]."""
        stored = val.detach().reshape(val.shape[0], -1).T if val.ndim > 1 else val.detach()
        self._keep(layer_name, self.cast(layer_name, stored))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.trtllm_model_weights[name] = self._brought(tensor)

    def _convert_transformer_layer(self, layer_name: str, val: torch.Tensor) -> None:
        """Convert one tensor of a layer, given by its target name and as Megatron has it."""
        tensors = to_megatron({layer_name: val.detach()}, MODULES)
        spec = self._shard_facts({layer_name: layer_name})
        tensors |= self._own_heads(tensors, {layer_name: layer_name})
        plan = build(self.partial_targets(tensors, spec, self.recipe()), val.new_empty)
        run_plan(plan, self.backend)
        for planned in plan:
            self._keep(planned.name, planned.dst)

    def _convert_non_transformer_layer(
        self, model_state_dict: dict[str, torch.Tensor], layer_name: str
    ) -> None:
        """Take one tensor out of the dict, if it is there, and store it."""
        if layer_name in model_state_dict:
            self._add_to_trtllm_model_weights(model_state_dict.pop(layer_name), layer_name)

    def _get_remove_vocab_padding(
        self, layer_name: str, model_state_dict: Mapping[str, Any], tokenizer_vocab_size: int
    ) -> torch.Tensor | None:
        """This rank's rows of an embedding without training's padding, as [H, rows]."""
        table = model_state_dict.get(layer_name)
        if table is None:
            return None
        tp = self.inference_tp_size
        wanted = vocabulary_ranges(tokenizer_vocab_size, tp)
        return self._exchange(table.detach(), wanted, -(-tokenizer_vocab_size // tp)).T
