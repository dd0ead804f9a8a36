"""Refit: the conversion of live parameters, planned once and run every training step.

    refit = Refit(model.state_dict(keep_vars=True), spec, Recipe(target="hf", quant="fp8-block"))
    (tensors,) = refit.run()

A run compares the parameters' addresses with the planned ones and launches each kind of move once;
all but a few large ones are looked at while the GPU works on those.
Where training has split the model, processes say where they are in it (`place`, `group`), and only
slices that a process lacks travel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from fuseport.kernels.move import GivenScale

from .arguments import check_given, check_kinds
from .backend import copier
from .buckets import buffer_bytes, filled, laid_out, rounds
from .errors import RecipeError, ShapeError
from .feeds import Workspace
from .live import Live
from .model import ModelSpec
from .passes import Here, Pass, workspace_bytes
from .plan import span, storage_key
from .recipe import Recipe
from .refit_amax import shared_amaxes
from .refit_plan import plan_refit
from .shards import Place
from .transfers import Wanted, traffic
from .turns import first_sources

Tensors = dict[str, torch.Tensor]
Bucket = list[tuple[str, torch.Tensor]]


class Refit:
    """Live parameters → the target's tensors, as often as wanted.

    Args:
        source: Megatron-Core's state dict, of the whole model or of this process's shards; it is
            kept, and a tensor in it may be exchanged or moved. To see a parameter whose `data` is
            exchanged it must hold the parameters themselves: `model.state_dict(keep_vars=True)`.
        spec: the whole model's facts.
        recipe: the target's parallel sizes, dtype and quantisation.
        outputs: for each target rank that is filled here, its tensors by name, to be written into:
            contiguous, with the target's shapes and dtypes. By default they are allocated.
        scales: a module's target name → the scale with which its weight becomes e4m3.
        backend: "triton", "torch", or "auto" (Triton on a GPU).
        graph: capture a run in a CUDA graph and replay it.
        place: where this process is in the model that training has split.
        group: the processes that have the whole model together. All of them make a `Refit`, and
            take part in each run.
        wants: the target's ranks that this process fills. By default all of them, or with a group
            process p fills rank p modulo their number: each run of processes is an engine.

    Raises:
        FuseportError: see `errors`. With a group all processes raise, or none.
    """

    # Memory that is made here is written again, outside of a mode that may be on now.
    @torch.inference_mode(False)
    def __init__(
        self,
        source: Mapping[str, torch.Tensor],
        spec: ModelSpec,
        recipe: Recipe,
        *,
        outputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
        scales: Mapping[str, GivenScale] | None = None,
        backend: str = "auto",
        graph: bool = False,
        place: Place | None = None,
        group: dist.ProcessGroup | None = None,
        wants: Sequence[int] | None = None,
    ) -> None:
        check_kinds(graph=graph)
        place = Place() if place is None else place
        self._plan = plan_refit(source, spec, recipe, scales, place, group, wants)
        _check_outputs(outputs, self._plan.ranks)
        device = next(source[own] for own in self._plan.names.values()).device
        constants = {name: value.to(device) for name, value in self._plan.constants.items()}
        is_split = graph or any(map(any, self.traffic))
        own = filled(self._plan.tensors, self._plan.process)
        self._first = set() if is_split else first_sources(own, self._plan.names)
        self._live = Live(source, self._plan.names, constants, self._first)
        self._here = Here(
            self._plan.process, self._live.tensors, copier(backend, device), group, device
        )
        self._outputs, self._graph = outputs, graph
        self._everything: tuple[Pass, list[Tensors]] | None = None
        self._replay: Callable[[], None] | None = None
        self._buckets: dict[int, list[tuple[Pass, Bucket]]] = {}
        shares = group is not None and bool(shared_amaxes(self._plan.tensors))
        if graph and (device.type != "cuda" or shares or any(map(any, self.traffic))):
            raise RecipeError(
                "graph=True needs parameters on a GPU, and slices that other processes hold, or "
                "scales that are found with them, cannot be part of a graph; leave it out"
            )

    def __reduce__(self) -> NoReturn:
        raise RecipeError(
            "a Refit cannot be copied or pickled: it knows where this process's parameters are; "
            "make another one"
        )

    @property
    def device(self) -> torch.device:
        """Where parameters and outputs are."""
        return self._here.device

    @property
    def traffic(self) -> list[list[int]]:
        """`[sender][receiver]`: the bytes that travel in one run, by process of the group."""
        return traffic(self._plan.tensors, self._plan.processes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, source: Mapping[str, torch.Tensor] | None = None) -> list[Tensors]:
        """Fill every output, on the current stream; the host waits for nothing.

        Args:
            source: a state dict to take the parameters from, from now on, by the same names.

        Returns:
            For each target rank that is filled here its tensors by name: the same ones each time.

        Raises:
            ShapeError: a parameter has another shape, strides or dtype than the planned one.
            MissingTensorError: it is gone, or has no memory.
        """
        check_given(source=source)
        looks = self._live.looks(source)
        if self._everything is None:
            self._follow(looks)
        filling, result = self._all()
        if self._first:
            # The GPU has something to do while the other parameters are looked at.
            self._follow(itertools.islice(looks, 1))
            filling.begin()
        self._follow(looks)
        if self._replay is not None:
            self._replay()
        else:
            filling.finish()
            self._replay = _captured(filling) if self._graph else None
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def buckets(
        self, nbytes: int, source: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[Bucket]:
        """The target's tensors in buckets of one buffer: each lives until the next is asked for.

        A bucket has at most `nbytes` bytes, but a tensor, or a group with common scales, that is
        larger comes alone. On a GPU a bucket is filled on the current stream: what reads it must
        be enqueued there, or have waited, before the next one is asked for.

        Raises:
            RecipeError: several target ranks are filled here, whose names are alike.
            ShapeError, MissingTensorError: as `run`.
        """
        check_kinds(nbytes=nbytes)
        check_given(source=source)
        if len(self._plan.ranks) > 1:
            raise RecipeError(
                f"buckets of the target's ranks {list(self._plan.ranks)} would have the same "
                f"names; give wants=[RANK]"
            )
        self._follow(self._live.looks(source))
        if nbytes not in self._buckets:
            self._buckets[nbytes] = list(self._make_buckets(nbytes))
        for filling, bucket in self._buckets[nbytes]:
            filling.run()
            yield bucket

    def _follow(self, looks: Iterable[set[str]]) -> None:
        """Look, and plan anew what comes from parameters that have moved."""
        try:
            if moved := set[str]().union(*looks):
                self._plan_anew(moved)
        except BaseException:
            # An error, or Ctrl-C: some may have followed and others not.
            self._live.forget()
            raise

    def _plan_anew(self, moved: set[str]) -> None:
        for made in self._buckets.values():
            for filling, _ in made:
                filling.follow(moved)
        if self._everything is not None and not self._everything[0].follow(moved):
            self._replay = None

    def _all(self) -> tuple[Pass, list[Tensors]]:
        """The pass that fills every output, made when it is first wanted."""
        if self._everything is None:
            tensors, process = self._plan.tensors, self._plan.process
            result: list[Tensors] = [{} for _ in self._plan.ranks]
            memory: dict[int, torch.Tensor] = {}
            for one in filled(tensors, process):
                place = self._plan.ranks.index(one.planned.rank)
                given = None if self._outputs is None else self._outputs[place]
                result[place][one.planned.name] = dst = _output(one, given, self._here.device)
                memory[storage_key(one.planned.dst)] = dst
            if self._outputs is not None:
                _check_apart(result, self._live.tensors)
            space = Workspace(workspace_bytes(tensors, process), self._here.device)
            self._everything = Pass(tensors, memory, space, self._here, self._first), result
        return self._everything

    def _make_buckets(self, nbytes: int) -> Iterator[tuple[Pass, Bucket]]:
        """Passes over one buffer, and one workspace, that are as large as the largest needs."""
        process, device = self._plan.process, self._here.device
        parts = rounds(self._plan.tensors, nbytes)
        buffer = Workspace(max(buffer_bytes(part, process) for part in parts), device)
        space = Workspace(max(workspace_bytes(part, process) for part in parts), device)
        for part in parts:
            places = list(laid_out(part, process, buffer))
            space.rewind()
            memory = {key: tensor for key, _, tensor in places}
            bucket = [(name, tensor) for _, name, tensor in places]
            yield Pass(part, memory, space, self._here), bucket


def _check_outputs(outputs: object, ranks: Sequence[int]) -> None:
    check_given(outputs=outputs)
    if isinstance(outputs, Sequence) and len(outputs) != len(ranks):
        raise ShapeError(
            f"outputs has {len(outputs)} dicts, expected one for each of the target's ranks "
            f"{list(ranks)} that are filled here"
        )


def _output(
    one: Wanted, given: Mapping[str, torch.Tensor] | None, device: torch.device
) -> torch.Tensor:
    """The memory of a target tensor: the caller's, or new."""
    planned = one.planned
    if given is None:
        return torch.empty_like(planned.dst, device=device)
    dst = given.get(planned.name)
    expected = planned.dst.dtype, tuple(planned.dst.shape), device
    found = None if dst is None else (dst.dtype, tuple(dst.shape), dst.device)
    if dst is None or found != expected or not dst.is_contiguous():
        raise ShapeError(
            f"outputs: {planned.name} must be contiguous and {expected}, found {found}; give a "
            f"tensor like that, or leave outputs out"
        )
    if dst.is_inference() and device.type == "cpu":
        raise ShapeError(
            f"outputs: {planned.name} was made in inference mode, and torch lets nobody write into "
            f"it here; make it outside of torch.inference_mode"
        )
    return dst


def _check_apart(outputs: Sequence[Tensors], parameters: Tensors) -> None:
    """Raise ShapeError if an output shares memory with another one, or with a parameter."""
    given = [(name, one, True) for tensors in outputs for name, one in tensors.items()]
    given += [(name, one, False) for name, one in parameters.items()]
    spans = sorted((*span(one), name, is_out) for name, one, is_out in given if one.numel())
    # The farthest end so far, of all and of the outputs alone, and whose it is.
    everything, written = (0, ""), (0, "")
    for start, stop, name, is_out in spans:
        end, other = everything if is_out else written
        if start < end:
            raise ShapeError(
                f"outputs: {name} and {other} share memory; give each tensor memory of its own"
            )
        everything = max(everything, (stop, name))
        written = max(written, (stop, name)) if is_out else written


def _captured(filling: Pass) -> Callable[[], None]:
    """A run as a CUDA graph; it has run before, so its kernels are compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filling.run()
    return graph.replay
