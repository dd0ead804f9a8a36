"""`fuseport bench`: a short measurement on the user's own machine.

Some layers of a Llama-like model are converted from memory to memory, as a refit does it, beside a
plain copy on the same device. Every result is compared with the reference first. Times run from an
idle device to an idle device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .errors import VerificationError
from .model import ModelSpec
from .recipe import Recipe
from .refit import Refit
from .state import convert_state_dict

Weights = Mapping[str, torch.Tensor]
# What is measured → the recipe's quant.
SCHEMES = MappingProxyType(
    {"bf16 → bf16": "none", "bf16 → e4m3, rows": "fp8-row", "bf16 → e4m3, 128 × 128": "fp8-block"}
)
# A share of the free memory: weights, results, the reference's results and what it works with.
SHARE, MOST, LAYERS = 8, 4 << 30, 20
REPEATS = 10


@dataclass(frozen=True)
class Seen:
    """One scheme: bytes read and written, seconds, and the kept plan's share of the copy's rate.

    `first` is a first call's time: views, plan, tables, memory, and kernels that were not compiled.
    """

    scheme: str
    nbytes: int
    first: float
    kept: float
    share: float


@dataclass(frozen=True)
class Bench:
    """A device, weights on it, and a copy's rate: bytes read and written per second."""

    device: torch.device
    spec: ModelSpec
    weights: Weights
    copy: float

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(value.nbytes for value in self.weights.values())

    @property
    def place(self) -> str:
        """The device, in words."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else "the CPU, at toy size"

    def schemes(self) -> Iterator[Seen]:
        """Each scheme, checked and timed.

        Raises:
            VerificationError: a result is not the reference's.
        """
        for name, quant in SCHEMES.items():
            yield self._see(name, Recipe(target="hf", quant=quant))

    def _see(self, name: str, recipe: Recipe) -> Seen:
        made: list[Refit] = []

        def first() -> None:
            made.append(Refit(self.weights, self.spec, recipe))
            made[0].run()

        begin = self._seconds(first)
        refit = made[0]
        (found,) = refit.run()
        self._check(name, recipe, found)
        nbytes = self.nbytes + sum(value.nbytes for value in found.values())
        kept = _median(lambda: self._seconds(refit.run))
        return Seen(name, nbytes, begin, kept, nbytes / kept / self.copy)

    def _check(self, name: str, recipe: Recipe, found: Weights) -> None:
        (expected,) = convert_state_dict(self.weights, self.spec, recipe, backend="torch")
        for tensor, value in expected.items():
            pair = (one.view(-1).view(torch.uint8) for one in (found[tensor], value))
            if not torch.equal(*pair):
                raise VerificationError(
                    f"{name}: {tensor} differs from the reference on {self.device}; please report "
                    f"this with the versions of torch and triton"
                )

    def _seconds(self, run: Callable[[], object]) -> float:
        return _seconds(run, self.device)


def prepare(device: torch.device) -> Bench:
    """Weights of a size that suits the device, and the copy's rate."""
    on_gpu = device.type == "cuda"
    spec = _dense(8192, 8) if on_gpu else _dense(256, 2)
    layer = sum(2 * torch.Size(shape).numel() for shape in _layer(spec).values())
    room = min(MOST, torch.cuda.mem_get_info(device)[0] // SHARE) if on_gpu else 2 * layer
    layers = max(1, min(LAYERS, room // layer))
    spec = spec.replace(num_layers=layers)
    weights = {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16)
        for name, shape in _shapes(spec).items()
    }
    return Bench(device, spec, weights, _copy_rate(device, layers * layer))


def _dense(hidden: int, heads: int) -> ModelSpec:
    """A rank's share of a dense model: next to no vocabulary, so that layers make its size."""
    # In whole blocks of 128 × 128, as engines want them.
    ffn = math.ceil(hidden * 7 / 16 / 128) * 128
    return ModelSpec(
        num_layers=1, hidden_size=hidden, num_attention_heads=heads, num_query_groups=1,
        kv_channels=128, ffn_hidden_size=ffn, vocab_size=256, model_type="llama",
    )  # fmt: skip


def _layer(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner = spec.hidden_size, spec.num_attention_heads * spec.kv_channels
    return {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (inner + 2 * spec.kv_channels, hidden),
        "self_attention.linear_proj.weight": (hidden, inner),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * spec.ffn_hidden_size, hidden),
        "mlp.linear_fc2.weight": (hidden, spec.ffn_hidden_size),
    }


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    words = (spec.vocab_size or 0, spec.hidden_size)
    layers = {
        f"decoder.layers.{number}.{name}": shape
        for number in range(spec.num_layers)
        for name, shape in _layer(spec).items()
    }
    ends = {"embedding.word_embeddings.weight": words, "output_layer.weight": words}
    return layers | ends | {"decoder.final_layernorm.weight": (spec.hidden_size,)}


def _copy_rate(device: torch.device, nbytes: int) -> float:
    source = torch.randint(255, (nbytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * nbytes / _median(lambda: _seconds(lambda: target.copy_(source), device))


def _median(time_one: Callable[[], float]) -> float:
    # The first times are warm-up.
    return statistics.median([time_one() for _ in range(2 + REPEATS)][2:])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
