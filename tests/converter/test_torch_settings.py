"""What a process has set in torch changes no bit: default dtype, default device, modes."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from fuseport_testing.smallest import shapes_of
from fuseport_testing.tiny import write_tiny
from safetensors.torch import load_file

from fuseport import converter
from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    verify_checkpoint,
)
from fuseport.converter.refit import Refit
from fuseport.kernels import reference

# Whole pieces of 32 for MXFP8.
FACTS = {
    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "ffn_hidden_size": 160,
}  # fmt: skip
SPEC = ModelSpec(**FACTS)  # type: ignore[arg-type]
SHAPES = shapes_of(FACTS, 128)
FILE = "model-00001-of-00001.safetensors"
# 0.3 is another number in bf16 than in fp32.
SCALES = {"*.mlp.*": {"weight": 0.3, "input": 0.3}, "*.attention.*": {"input": 0.3}}
RECIPES = {
    "given": Recipe(quant="fp8", scales=SCALES, kv_cache="fp8"),
    "fp8": Recipe(target="hf", quant="fp8"),
    "fp8-block": Recipe(target="hf", quant="fp8-block"),
    "mxfp8": Recipe(target="hf", quant="mxfp8"),
    "nvfp4": Recipe(target="hf", quant="nvfp4"),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Setting = Callable[[], AbstractContextManager[object]]
SETTINGS: dict[str, Setting] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        one, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert found[name].dtype is tensor.dtype
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore::fuseport.converter.errors.FuseportWarning")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_bits_in_memory_are_the_same(setting: Setting, recipe: Recipe) -> None:
    source = state()
    (expected,) = convert_state_dict(source, SPEC, recipe)
    with setting():
        (found,) = convert_state_dict(source, SPEC, recipe)
        (live,) = Refit(source, SPEC, recipe).run()
    assert_same(found, expected)
    assert_same(live, expected)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_files_are_the_same(setting: Setting, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    recipe = RECIPES["fp8-block"]
    convert_checkpoint(source, tmp_path / "plain", recipe)
    with setting():
        convert_checkpoint(source, tmp_path / "out", recipe, measure=True)
        verify_checkpoint(tmp_path / "out", source)
        convert_checkpoint(tmp_path / "plain", tmp_path / "back", Recipe(target="hf"))
        verify_checkpoint(tmp_path / "back", tmp_path / "plain")
    found, expected = (load_file(tmp_path / one / FILE) for one in ("out", "plain"))
    assert_same(found, expected)


def test_a_refit_outlives_the_mode() -> None:
    refit = Refit(state(), SPEC, RECIPES["fp8-block"])
    (expected,) = convert_state_dict(state(), SPEC, RECIPES["fp8-block"])
    with torch.inference_mode():
        made_within = Refit(state(), SPEC, RECIPES["fp8-block"])
        made_within.run()
        list(refit.buckets(1 << 14))
    assert_same(made_within.run()[0], expected)
    found = {name: one.clone() for bucket in refit.buckets(1 << 14) for name, one in bucket}
    assert_same(found, expected)


def unsettled(path: Path) -> Iterator[str]:
    """Calls in a file that make a tensor of a dtype, or on a device, that the process has set."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        function, given = ast.unparse(node.func), {word.arg for word in node.keywords}
        needed = MAKERS.get(function, set())
        if not needed <= given:
            yield f"{path.name}:{node.lineno}: {function}"


BOTH = {"dtype", "device"}
MAKERS = {
    "torch.zeros": BOTH, "torch.ones": BOTH, "torch.empty": BOTH, "torch.full": BOTH,
    "torch.tensor": BOTH, "torch.as_tensor": BOTH, "torch.arange": {"device"},
}  # fmt: skip


@pytest.mark.parametrize("file", [converter.__file__, reference.__file__], ids=["c", "k"])
def test_no_tensor_is_made_by_what_a_process_has_set(file: str) -> None:
    folder = Path(file).parent
    assert not [one for path in sorted(folder.rglob("*.py")) for one in unsettled(path)]
