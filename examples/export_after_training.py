"""The end of a Megatron-Core training script: the model, on one rank, is published to be served.

    python examples/export_after_training.py [OUT]

`train` stands for the script; what it adds is `publish`. A model that training has split over ranks
is saved as usual (torch_dist) and converted from there (convert_offline.py), or refitted in place
(refit_loop.py).
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fuseport.converter import ModelSpec, Recipe, export_state_dict, verify_checkpoint

VOCABULARY = 100


def publish(model: Any, out: Path) -> None:
    """The last lines: facts that Megatron's configuration lacks, the recipe, the files."""
    spec = ModelSpec.from_facts(
        vars(model.config),
        vocab_size=VOCABULARY,
        max_position_embeddings=model.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=10000.0,
        share_embeddings_and_output_weights=False,
    )
    report = export_state_dict(
        model.state_dict(), spec, Recipe(target="hf", quant="fp8-block"), out, overwrite=True
    )
    checked = verify_checkpoint(out)
    print(f"{out}: {checked.tensors} tensors, {report.nbytes} bytes")


def train() -> Any:
    """A small GPTModel with Llama's layers, after no steps at all."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    place = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    layers = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config,
        layers,
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


if __name__ == "__main__":
    publish(train(), Path(sys.argv[1] if len(sys.argv) > 1 else "out/trained"))
    dist.destroy_process_group()
