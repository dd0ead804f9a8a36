"""YaRN's scaling of rotary positions (https://arxiv.org/abs/2309.00071), in both sides' words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from .errors import ModelError
from .facts import POSITIVE, loose

# Field → Hugging Face's key where it is another.
HF_KEYS = {"rotary_scaling_factor": "factor"}


@dataclass(frozen=True)
class Yarn:
    """Megatron-Core's names and defaults; a `mscale_all_dim` of 0 is none."""

    rotary_scaling_factor: float = 40.0
    original_max_position_embeddings: float = 4096.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @classmethod
    def read(cls, facts: Mapping[str, object]) -> Yarn:
        """From Megatron's arguments, or what `asdict` made.

        Raises:
            ModelError: a value is no positive number.
        """
        given = {field.name: facts[field.name] for field in fields(cls) if facts.get(field.name)}
        for name, value in given.items():
            POSITIVE.check(name, loose(POSITIVE, value))
        return cls(**{name: float(str(value)) for name, value in given.items()})

    @classmethod
    def from_hf(cls, scaling: Mapping[str, object]) -> Yarn:
        """From `rope_scaling`, whose `mscale` and `mscale_all_dim` count only together."""
        keys = {field.name: HF_KEYS.get(field.name, field.name) for field in fields(cls)}
        given = {name: scaling[key] for name, key in keys.items() if scaling.get(key) is not None}
        if not (given.get("mscale") and given.get("mscale_all_dim")):
            given |= {"mscale": 1.0, "mscale_all_dim": 0.0}
        return cls.read(given)

    def as_hf(self) -> dict[str, object]:
        """As `rope_scaling`.

        Raises:
            ModelError: transformers takes these for others.
        """
        if not self.mscale_all_dim and self.mscale != 1.0:
            raise ModelError(
                f"mscale = {self.mscale} without mscale_all_dim: Hugging Face's config.json cannot "
                f"say it; give both, or mscale = 1"
            )
        values = {HF_KEYS.get(name, name): value for name, value in asdict(self).items()}
        values["original_max_position_embeddings"] = int(self.original_max_position_embeddings)
        return {"rope_type": "yarn", "type": "yarn", **values}
