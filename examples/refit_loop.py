"""A training loop that refits a serving engine after every step, in buckets that reuse one buffer.

    python examples/refit_loop.py

`Engine` stands for the server: with vLLM its `load` is `model.load_weights`, with SGLang
`engine.update_weights_from_tensor`, and `fuseport.converter.handover` has TensorRT-LLM's form.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fuseport.converter import ModelSpec, Recipe
from fuseport.converter.handover import named_tensors
from fuseport.converter.refit import Refit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = ModelSpec(
    num_layers=1,
    hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    ffn_hidden_size=384,
)
SHAPES = {
    "embedding.word_embeddings.weight": (128, 256),
    "decoder.layers.0.input_layernorm.weight": (256,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (512, 256),
    "decoder.layers.0.self_attention.linear_proj.weight": (256, 256),
    "decoder.layers.0.pre_mlp_layernorm.weight": (256,),
    "decoder.layers.0.mlp.linear_fc1.weight": (768, 256),
    "decoder.layers.0.mlp.linear_fc2.weight": (256, 384),
    "decoder.final_layernorm.weight": (256,),
    "output_layer.weight": (128, 256),
}
BUCKET = 256 * 1024


class Engine:
    """Keeps its own copy of the weights, as a server does."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy each tensor before the next one is asked for."""
        for name, tensor in tensors:
            self.weights.setdefault(name, torch.empty_like(tensor)).copy_(tensor)


def main(steps: int = 3) -> None:
    """Parameters that a step changes in place; `Refit` is planned once."""
    torch.manual_seed(0)
    # In training: model.state_dict(keep_vars=True)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, device=DEVICE) / 8)
        for name, shape in SHAPES.items()
    }
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    refit = Refit(parameters, SPEC, Recipe(target="hf", quant="fp8-block"))
    engine = Engine()
    for step in range(steps):
        loss = torch.stack([parameter.square().sum() for parameter in parameters.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.load(named_tensors(refit, BUCKET))
        scale = engine.weights["model.layers.0.mlp.down_proj.weight_scale_inv"]
        print(f"step {step}: {len(engine.weights)} tensors, the first scale {scale[0, 0]:.6f}")


if __name__ == "__main__":
    main()
