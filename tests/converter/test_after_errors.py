"""A call that failed, or was interrupted, leaves nothing behind that makes the next one wrong."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fuseport_testing.smallest import FACTS, SHAPES
from fuseport_testing.tiny import write_tiny

from fuseport.converter import (
    FuseportError,
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    verify_checkpoint,
)
from fuseport.converter import megatron as drop_in
from fuseport.converter.errors import MissingTensorError, ShapeError
from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel
from fuseport.converter.passes import Pass
from fuseport.converter.refit import Refit

SPEC, HF = ModelSpec(**FACTS), Recipe(target="hf")  # type: ignore[arg-type]
ONE = "decoder.layers.0.mlp.linear_fc2.weight"
State = dict[str, torch.Tensor]


def state(value: float) -> State:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def same(found: State, expected: State) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def converted(source: State) -> State:
    (expected,) = convert_state_dict(source, SPEC, HF)
    return expected


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (torch.ones(SHAPES[ONE], dtype=torch.bfloat16), ShapeError),
        (torch.ones(3), ShapeError),
        (torch.ones(SHAPES[ONE], device="meta"), ShapeError),
    ],
    ids=["dtype", "shape", "meta"],
)
def test_what_a_refit_refuses_it_refuses_again(other: torch.Tensor, error: type[Exception]) -> None:
    refit, source = Refit(state(1.0), SPEC, HF), state(2.0)
    refit.run()
    for _ in range(2):
        with pytest.raises(error, match=f"{ONE} is now"):
            refit.run({**source, ONE: other})
        # It is still the one to take the parameters from.
        with pytest.raises(error, match=f"{ONE} is now"):
            next(refit.buckets(1000))
    assert same(refit.run(source)[0], converted(source))


def test_memory_that_is_gone_is_missed_again() -> None:
    source = state(1.0)
    refit = Refit(source, SPEC, HF)
    source[ONE].untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(MissingTensorError, match="has no memory now"):
            refit.run()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_refit_that_was_interrupted_while_it_followed(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refit, source = Refit(state(1.0), SPEC, HF), state(2.0)
    refit.run()
    list(refit.buckets(1000))
    follow, calls = Pass.follow, []

    def interrupted(self: Pass, moved: set[str]) -> bool:
        calls.append(moved)
        good = follow(self, moved) if when == "after" or len(calls) < 3 else True
        if len(calls) == 3:
            raise KeyboardInterrupt
        return good

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refit.run(source)
    assert same(refit.run()[0], converted(source))
    found = {name: one.clone() for bucket in refit.buckets(1000) for name, one in bucket}
    assert same(found, converted(source))


def test_outputs_that_share_memory() -> None:
    source = {name: tensor.bfloat16() for name, tensor in state(1.0).items()}
    outputs = {name: torch.empty_like(tensor) for name, tensor in converted(source).items()}
    norms = [name for name in outputs if "layernorm" in name]
    assert len(norms) == 2
    shared = {**outputs, norms[0]: outputs[norms[1]]}
    with pytest.raises(ShapeError, match=r"outputs: .*layernorm.* and .*layernorm.* share memory"):
        Refit(source, SPEC, HF, outputs=[shared]).run()
    onto = {**outputs, "lm_head.weight": source["output_layer.weight"]}
    with pytest.raises(ShapeError, match=r"share memory"):
        Refit(source, SPEC, HF, outputs=[onto]).run()
    with torch.inference_mode():
        made = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
    with pytest.raises(ShapeError, match="was made in inference mode"):
        Refit(source, SPEC, HF, outputs=[made]).run()
    # Parts of one buffer do not.
    buffer = torch.empty(16, dtype=torch.bfloat16)
    apart = {**outputs, norms[0]: buffer[:8], norms[1]: buffer[8:]}
    Refit(source, SPEC, HF, outputs=[apart]).run()
    assert same(apart, converted(source))


def test_a_drop_in_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Namespace(**FACTS, normalization="RMSNorm", num_moe_experts=None)
    converter = DistributedTRTLLMModelWeightsConverter(
        config, "bfloat16", activation="swiglu", parallel=Parallel()
    )
    first, second = state(1.0), state(2.0)
    converter.convert(first, {}, 32)
    expected = {name: one.clone() for name, one in converter.trtllm_model_weights.items()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # What comes last before the plan is kept.
        patch.setattr(drop_in, "share_memory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converter.convert(second, {}, 32)
    converter.convert(first, {}, 32)
    assert same(converter.trtllm_model_weights, expected)


def test_a_conversion_that_was_interrupted(tmp_path: Path) -> None:
    source, out = write_tiny(tmp_path / "source"), tmp_path / "out"

    def interrupted(nbytes: int) -> None:
        raise KeyboardInterrupt

    for resume, kept in ((False, 0), (True, 1)):
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, out, HF, progress=interrupted, resume=resume)
        assert len(list(tmp_path.glob("out*"))) == kept
    convert_checkpoint(source, out, HF, resume=True)
    with pytest.raises(KeyboardInterrupt):
        verify_checkpoint(out, source, progress=interrupted)
    assert verify_checkpoint(out, source).accounting is not None
    with pytest.raises(FuseportError, match="exists"):
        convert_checkpoint(source, out, HF)
