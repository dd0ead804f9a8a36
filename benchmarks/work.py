"""What is measured: a model's weights on the device, a recipe, and the check of a result.

A case is a model (or one rank of it) and a target; a scheme says what its linear weights become.
A plan's result is compared with the reference bit for bit, a few tensors at a time, so that the
largest work that fits the memory can be checked too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.alike import Alike
from fuseport.converter.backend import Copy, copier
from fuseport.converter.plan import Planned, batches, storage_key
from fuseport.converter.refit import Refit
from fuseport.converter.repeats import Repeats
from fuseport.converter.repeats import Work as Patterns
from fuseport.converter.sources.megatron import read_model
from fuseport.converter.state import plan_memory, prepare
from fuseport.kernels.move import Move
from fuseport.kernels.quant import NvScale, TensorScale, placed
from fuseport.kernels.reference import fused_copy_ref

from .measure import Run, seconds
from .models import Shapes, given_scales, random_weights, shapes

Weights = Mapping[str, torch.Tensor]
# A power of two: both it and its reciprocal are exact.
QUANT_SCALE = 32.0
GIVEN = {"*": {"weight": 1 / QUANT_SCALE}}
# Scheme → the recipe's options.
SCHEMES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "bf16": {},
        "given": {"quant": "fp8", "scales": GIVEN},
        "tensor": {"quant": "fp8"},
        "row": {"quant": "fp8-row"},
        "block": {"quant": "fp8-block"},
        "mx": {"quant": "mxfp8"},
        "nv": {"quant": "nvfp4"},
    }
)
# Bytes that are compared at once.
CHECKED = 2 << 30
POISON = 0xA5


@dataclass(frozen=True)
class Case:
    """A model, whole or a rank's own sizes, and where it goes."""

    name: str
    spec: ModelSpec
    target: str = "hf"
    tp_size: int = 1

    def recipe(self, scheme: str) -> Recipe:
        """The recipe of a scheme; for trtllm given scales are an argument of their own."""
        options = {} if self.takes_scales(scheme) else dict(SCHEMES[scheme])
        return Recipe(target=self.target, tp_size=self.tp_size, **options)  # type: ignore[arg-type]

    def takes_scales(self, scheme: str) -> bool:
        """True if scales of weights alone are given, as Megatron-Core's converter takes them."""
        return self.target == "trtllm" and scheme == "given"

    def shapes(self) -> Shapes:
        """The tensors of the source."""
        return shapes(self.spec)


def has_amax(move: Move) -> bool:
    """True if a weight's amax must be known before its first code."""
    return isinstance(move.quant, TensorScale | NvScale)


class Work:
    """A case's weights on a device, and every way to convert them.

    With `wanted`, only the weights whose names it accepts.
    """

    def __init__(
        self,
        case: Case,
        scheme: str,
        device: torch.device,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.case, self.scheme, self.device = case, scheme, device
        self.spec, self.recipe = case.spec, case.recipe(scheme)
        # The model that this is a tensor parallel rank of, and its size, where that is known.
        self.whole: tuple[ModelSpec, int] | None = None
        chosen = {name: shape for name, shape in case.shapes().items() if wanted(name)}
        self.weights = random_weights(chosen, device)
        given = given_scales(self.spec, QUANT_SCALE)
        self.scales = given if case.takes_scales(scheme) else None
        # Triton's interpreter would take minutes.
        self.backend = "triton" if device.type == "cuda" else "torch"
        self.copier = copier(self.backend, device)

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(value.nbytes for value in self.weights.values())

    def plan(self) -> list[Planned]:
        """Views, rules and moves, and memory for the results."""
        model = read_model(self.weights, self.spec)
        return plan_memory(self.weights, model, self.spec, self.recipe, self.scales)

    @cached_property
    def planned(self) -> list[Planned]:
        """A plan that is kept."""
        return self.plan()

    @cached_property
    def batch(self) -> Copy:
        """The kept plan's launches."""
        return self.copier(moves_of(self.planned))

    @cached_property
    def moved_bytes(self) -> int:
        """Bytes that must be read and written, whatever does it: for an amax weights come twice."""
        plan = self.planned
        read = sum(m.src.nbytes * (1 + has_amax(m)) for m in moves_of(plan))
        return read + sum(one.nbytes for one in plan)

    def outputs(self) -> list[dict[str, torch.Tensor]]:
        """The kept plan's tensors, of each rank by name."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(self.recipe.world_size)]
        for one in self.planned:
            found[one.rank][one.name] = one.dst
        return found

    def drop_plan(self) -> None:
        """Give the results' memory back; a plan is made anew when it is asked for."""
        for name in ("planned", "batch"):
            self.__dict__.pop(name, None)

    def convert(self) -> object:
        """The public call: views, plan, memory, tables, launches."""
        return convert_state_dict(
            self.weights, self.spec, self.recipe, scales=self.scales, backend=self.backend
        )

    def first_call(self) -> Run:
        """`convert`, once the kept plan's memory is given back: a call makes its own."""
        self.drop_plan()
        return self.convert

    def refit(self, graph: bool = False, own_outputs: bool = True) -> Refit:
        """A plan that is kept for live parameters, into the kept plan's memory or none yet."""
        return Refit(
            self.weights, self.spec, self.recipe, scales=self.scales, backend=self.backend,
            graph=graph, outputs=self.outputs() if own_outputs else None,
        )  # fmt: skip

    def stages(self) -> dict[str, float]:
        """Seconds of a first call's parts, one after the other: plan and memory, tables, launch."""
        found: list[Any] = []
        plan = seconds(lambda: found.append(self.anew()))
        work = found[0]
        tables = seconds(lambda: found.append(self.copier(work.moves, work.repeats)))
        return {"plan": plan, "tables": tables, "launch": seconds(found[1].run)}

    def anew(self) -> Patterns:
        """A plan as a first call makes it, and memory for the results."""
        alike = Alike(self.weights, self.spec)
        model = read_model(alike.others, self.spec, alike=alike.first)
        targets, make = prepare(self.weights, model, self.spec, self.recipe, self.scales)
        return Repeats(make, alike).work(targets)

    def is_equal(self) -> bool:
        """Poison the kept plan's memory, fill it, and compare with the reference."""
        for one in self.planned:
            one.dst.view(-1).view(torch.uint8).fill_(POISON)
        self.batch.run()
        return all(matches(chunk) for chunk in batches(self.planned, CHECKED))


def moves_of(plan: Sequence[Planned]) -> list[Move]:
    """All moves of a plan."""
    return [move for planned in plan for move in planned.moves]


def matches(chunk: Sequence[Planned]) -> bool:
    """True if tensors hold what the reference makes of their moves' sources."""
    twins, moves = twin(chunk)
    fused_copy_ref(moves)
    return all(same_bits(one.dst, expected) for one, expected in zip(chunk, twins, strict=True))


def twin(chunk: Sequence[Planned]) -> tuple[list[torch.Tensor], list[Move]]:
    """Fresh memory of the same layout, and the moves into it."""
    fresh = [torch.empty_like(one.dst) for one in chunk]
    memory = {storage_key(one.dst): new for one, new in zip(chunk, fresh, strict=True)}

    def place(view: torch.Tensor) -> torch.Tensor:
        # What is no output (a group's amax) is scratch, and is shared as the original is.
        own = memory.setdefault(storage_key(view), torch.empty_like(view))
        return own.as_strided(view.shape, view.stride(), view.storage_offset())

    return fresh, [
        Move(place(move.dst), move.src, move.shift, placed(move.quant, place))
        for move in moves_of(chunk)
    ]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
