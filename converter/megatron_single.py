"""Drop-in for Megatron-Core's `SingleDeviceTRTLLMModelWeightsConverter`: whole model, all ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .arguments import check_kinds, check_state
from .claims import LenientClaims
from .errors import MissingTensorError, RecipeError
from .megatron_base import WeightsConverter, check_fields
from .model import ModelSpec
from .plan import Planned, build
from .recipe import Recipe, check
from .sources.megatron import read_model
from .sources.source import by_layer
from .state import run_plan, weights, zero_row
from .targets.parts import TargetTensor
from .targets.trtllm import TrtllmRules
from .targets.trtllm_config import padded_vocab_size
from .trtllm_layers import MODULES, to_megatron

EMBEDDING, POSITIONS = "transformer.vocab_embedding.weight", "transformer.position_embedding.weight"
OUTPUT = "lm_head.weight"
FINAL_NORM = ("transformer.ln_f.weight", "transformer.ln_f.bias")

_LAYER = re.compile(r"^(transformer\.layers\.)(\d+)(\..+)$")
_SPLIT = re.compile(r"^(.+)\.(\d+)\.bin$")


class SingleDeviceTRTLLMModelWeightsConverter(WeightsConverter):
    """Converts a whole model on one device, for any tensor and pipeline parallel size.

    All ranks' tensors are filled by one launch per kind; what every rank has alike is kept once.
    Arguments that are not listed are as for the distributed one.

    Args:
        export_config: with `inference_tp_size`, `inference_pp_size`, `use_parallel_embedding`.
        moe_ep_size: ranks that share out the experts; divides tp.
        backend: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        export_config: Any,
        transformer_config: Any,
        dtype: Any,
        multi_query_mode: bool = False,
        activation: str = "gelu",
        scales: Mapping[str, Any] | None = None,
        *,
        moe_ep_size: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(transformer_config, dtype, multi_query_mode, activation, scales, backend)
        check_fields(RecipeError, export_config=export_config)
        self.export_config = export_config
        self.moe_ep_size = moe_ep_size

    @torch.inference_mode(False)
    @torch.no_grad()
    def convert(
        self,
        model_state_dict: Mapping[str, Any],
        trtllm_conversion_dict: Mapping[str, Any],
        state_dict_split_by_layer_numbers: bool = True,
    ) -> None:
        """Fill `trtllm_model_weights`: `{name}.{tp rank}.bin` where ranks differ, else `{name}`.

        Layers keep the whole model's numbers; `get_local_model_weights_per_gpu` renumbers.

        Args:
            model_state_dict: the whole model's tensors; left as it is.
            trtllm_conversion_dict: names without layer numbers → `TRTLLMLayers`.
            state_dict_split_by_layer_numbers: False where a leading axis counts the layers. Which
                it is shows in the names; the argument is there because the reference has it.

        Raises:
            FuseportError: see `errors`.
        """
        check_kinds(trtllm_conversion_dict=trtllm_conversion_dict)
        check_state(model_state_dict)
        named = to_megatron(weights(model_state_dict), trtllm_conversion_dict)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in named.items():
            tensors |= by_layer(name, tensor)
        spec = self.facts(trtllm_conversion_dict)
        recipe = self._recipe()
        check(spec, recipe)
        self._store(self._plan(tensors, spec, recipe))

    def _recipe(self) -> Recipe:
        return self.recipe(
            tp_size=self.export_config.inference_tp_size, moe_ep_size=self.moe_ep_size
        )

    def _plan(
        self, tensors: Mapping[str, torch.Tensor], spec: ModelSpec, recipe: Recipe
    ) -> list[Planned]:
        """Layers for every rank; embeddings and head whole, to be split later."""
        model = read_model(tensors, spec, LenientClaims)
        example = next(iter(tensors.values()))
        zeros, scales = zero_row(model, spec, example.device), self.given_scales(example.device)
        whole = TrtllmRules(model, spec, self.recipe(), zeros, scales)
        split = TrtllmRules(model, spec, recipe, zeros, scales)
        targets = [t for t in whole.tensors() if not _LAYER.match(t.name)]
        targets += _named(t for t in split.tensors() if _LAYER.match(t.name))
        return build(targets, example.new_empty)

    def _store(self, plan: list[Planned]) -> None:
        run_plan(plan, self.backend)
        for planned in plan:
            self.trtllm_model_weights[planned.name] = planned.dst
        if EMBEDDING in self.trtllm_model_weights and self.export_config.use_parallel_embedding:
            table = self.trtllm_model_weights[EMBEDDING]
            self.trtllm_model_weights[EMBEDDING] = self._padded(table)

    def _padded(self, table: torch.Tensor) -> torch.Tensor:
        """Zero rows up to a multiple of tp."""
        rows = padded_vocab_size(table.shape[0], self.export_config.inference_tp_size)
        return torch.nn.functional.pad(table, (0, 0, 0, rows - table.shape[0]))

    def get_padded_vocab_size(self) -> int:
        """The vocabulary as TensorRT-LLM counts it: padded if there is an output layer.

        Raises:
            MissingTensorError: nothing was converted yet.
        """
        if EMBEDDING not in self.trtllm_model_weights:
            raise MissingTensorError(
                f"trtllm_model_weights has no {EMBEDDING}; call convert with the whole model first"
            )
        rows = self.trtllm_model_weights[EMBEDDING].shape[0]
        if OUTPUT not in self.trtllm_model_weights:
            return int(rows)
        return padded_vocab_size(rows, self.export_config.inference_tp_size)

    def get_local_model_weights_per_gpu(
        self, mapping: Any, trtllm_model_config: Any
    ) -> dict[str, torch.Tensor]:
        """One rank's tensors, layers numbered from its stage's first.

        Args:
            mapping: with `tp_size`, `tp_rank`, `pp_layers`, `is_first_pp_rank`, `is_last_pp_rank`.
            trtllm_model_config: its `new_decoder_architecture` gives Falcon's norm its name.

        Raises:
            RecipeError: `mapping` lacks one of these.
        """
        check_fields(RecipeError, mapping=mapping)
        layers = mapping.pp_layers(self.transformer_config.num_layers)
        falcon = bool(getattr(trtllm_model_config, "new_decoder_architecture", False))
        local = dict(self._layers_of(mapping.tp_rank, layers, falcon))
        if mapping.is_first_pp_rank():
            share = self.export_config.use_parallel_embedding
            for name in (EMBEDDING, POSITIONS):
                local |= self._rows(name, mapping, share)
        if mapping.is_last_pp_rank():
            local |= self._head(mapping)
            for name in FINAL_NORM:
                local |= self._rows(name, mapping, False)
        return local

    def _layers_of(
        self, tp_rank: int, layers: Any, falcon: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in self.trtllm_model_weights.items():
            split = _SPLIT.match(key)
            match = _LAYER.match(key if split is None else split[1])
            if match is None or int(match[2]) not in layers:
                continue
            if split is not None and int(split[2]) != tp_rank:
                continue
            part = match[3].replace(".post_layernorm.", ".mlp_layernorm.") if falcon else match[3]
            yield f"{match[1]}{int(match[2]) - layers[0]}{part}", tensor

    def _head(self, mapping: Any) -> dict[str, torch.Tensor]:
        """The output's rows; a tied model's embedding where the stage does not have that too."""
        if OUTPUT in self.trtllm_model_weights or mapping.is_first_pp_rank():
            return self._rows(OUTPUT, mapping, True)
        tied = self._rows(EMBEDDING, mapping, True).get(EMBEDDING)
        return {} if tied is None else {OUTPUT: self.cast(OUTPUT, tied)}

    def _rows(self, name: str, mapping: Any, share: bool) -> dict[str, torch.Tensor]:
        """A rank's share of an unsplit tensor, zero rows where the vocabulary ends."""
        whole = self.trtllm_model_weights.get(name)
        if whole is None:
            return {}
        if not share or mapping.tp_size == 1:
            return {name: whole}
        padded = self._padded(whole) if name != POSITIONS else whole
        return {name: padded.chunk(mapping.tp_size)[mapping.tp_rank].contiguous()}

    # The reference's own method names: doors to the same path for one tensor at a time.

    def _convert_transformer_layer(self, layer_name: str, val: torch.Tensor) -> None:
        """Convert one tensor of a layer, given by its target name and as Megatron has it."""
        tensors = to_megatron({layer_name: val.detach()}, MODULES)
        spec = self.facts({layer_name: layer_name})
        targets = _named(self.partial_targets(tensors, spec, self._recipe()))
        self._store(build(targets, val.new_empty))

    def _convert_non_transformer_layer(
        self, model_state_dict: dict[str, torch.Tensor], layer_name: str
    ) -> None:
        """Take one tensor out of the dict, if it is there, and store it as it is, cast."""
        if layer_name in model_state_dict:
            value = model_state_dict.pop(layer_name)
            self.trtllm_model_weights[layer_name] = self.cast(layer_name, value.detach())


def _named(targets: Iterable[TargetTensor]) -> Iterator[TargetTensor]:
    """The reference's keys: one tensor where every rank has the same, else one for each rank."""
    for target in targets:
        if not target.replicated:
            yield target._replace(name=f"{target.name}.{target.rank}.bin")
        elif target.rank == 0:
            yield target
