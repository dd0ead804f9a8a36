"""fp8 weights in the files of a legacy Megatron checkpoint: as in memory, over all ranks."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseport_testing import te_pickles
from fuseport_testing import te_tensors as te
from fuseport_testing.te_pickles import pickled, save_rank
from safetensors.torch import load_file

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    verify_checkpoint,
)
from fuseport.converter.errors import (
    FuseportError,
    FuseportWarning,
    ScaleError,
    ShapeError,
    UnsafeSourceError,
    UnsupportedOptionError,
)
from fuseport.converter.sources.source import open_source
from fuseport.converter.sources.torch_zip import Window, find_payload

# Heads and halves of 256 rows, so that two ranks have whole blocks.
HIDDEN, HEADS, GROUPS, HEAD, FFN = 256, 4, 2, 128, 512
SPEC = ModelSpec(
    num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=GROUPS,
    kv_channels=HEAD, ffn_hidden_size=FFN,
)  # fmt: skip
FACTS = argparse.Namespace(
    num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, group_query_attention=True,
    num_query_groups=GROUPS, kv_channels=HEAD, ffn_hidden_size=FFN, swiglu=True,
    normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True, max_position_embeddings=64,
)  # fmt: skip
LAYER = "decoder.layers.0."
# Linear → its shape, the axis along which ranks share it, and its parts along that.
LINEARS: dict[str, tuple[tuple[int, int], int, int]] = {
    "self_attention.linear_qkv": (((HEADS + 2 * GROUPS) * HEAD, HIDDEN), 0, 1),
    "self_attention.linear_proj": ((HIDDEN, HEADS * HEAD), 1, 1),
    "mlp.linear_fc1": ((2 * FFN, HIDDEN), 0, 2),
    "mlp.linear_fc2": ((HIDDEN, FFN), 1, 1),
}
QUANTS = {"tensor": "fp8", "block128": "fp8-block", "mx32": "mxfp8"}
State = dict[str, Any]


def whole_state(scheme: str) -> State:
    """A model of one layer whose linears are Transformer Engine's tensors."""
    torch.manual_seed(0)
    made: State = {
        "embedding.word_embeddings.weight": torch.randn(32, HIDDEN),
        "output_layer.weight": torch.randn(32, HIDDEN),
    }
    norms = ("decoder.final_layernorm", f"{LAYER}input_layernorm", f"{LAYER}pre_mlp_layernorm")
    made |= {f"{name}.weight": torch.rand(HIDDEN) for name in norms}
    for number, (name, (shape, _, _)) in enumerate(LINEARS.items()):
        if scheme == "tensor":
            weight: Any = te.Float8Tensor(te.codes(*shape), torch.tensor([0.5 + number]))
        else:
            weight, _ = te.blockwise(*shape) if scheme == "block128" else te.mx(*shape)
        made[f"{LAYER}{name}.weight"] = weight
    return made


def cut(tensor: torch.Tensor, axis: int, parts: int, rank: int, tp: int) -> torch.Tensor:
    shards = [part.chunk(tp, axis)[rank] for part in tensor.chunk(parts, axis)]
    return torch.cat(shards, axis).contiguous()


def shard(state: State, rank: int, tp: int) -> State:
    """What Megatron-Core's rank has, quantised by itself: whole blocks, padded scales."""
    result: State = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            rows = "embeddings" in name or "output" in name
            result[name] = value.chunk(tp)[rank].clone() if rows else value
            continue
        _, axis, parts = LINEARS[name.removeprefix(LAYER).removesuffix(".weight")]
        if isinstance(value, te.Float8Tensor):
            codes = cut(value._data, axis, parts, rank, tp)
            result[name] = te.Float8Tensor(codes, value._scale_inv)
            continue
        codes = cut(value._rowwise_data, axis, parts, rank, tp)
        height, width = (128, 128) if isinstance(value, te.Float8BlockwiseQTensor) else (1, 32)
        rows, columns = (size // one for size, one in
                         zip(value._rowwise_data.shape, (height, width), strict=True))  # fmt: skip
        grid = cut(value._rowwise_scale_inv[:rows, :columns], axis, parts, rank, tp)
        multiple = 1 if height == 128 else 128
        padded = grid.new_full(
            (-(-grid.shape[0] // multiple) * multiple, -(-grid.shape[1] // 4) * 4), 0x55
        )
        padded[: grid.shape[0], : grid.shape[1]] = grid
        result[name] = type(value)(codes, padded)
    return result


def save(path: Path, state: State, tp: int = 1, form: str = "method", **facts: Any) -> Path:
    for rank in range(tp):
        own = {
            name: value if isinstance(value, torch.Tensor) else pickled(value, form)
            for name, value in shard(state, rank, tp).items()
        }
        values = vars(FACTS) | {"padded_vocab_size": 32} | facts
        save_rank(path / f"mp_rank_{rank:02d}", own, argparse.Namespace(**values))
    return path


def assert_as_in_memory(out: Path, state: State, recipe: Recipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseportWarning)
        ranks = convert_state_dict(state, SPEC, recipe)
    files = sorted(out.glob("*.safetensors"))
    for file, expected in zip(files, ranks, strict=True):
        found = load_file(file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            one, other = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("scheme", "tp", "form"),
    [
        ("tensor", 2, "method"), ("tensor", 2, "function"), ("block128", 2, "method"),
        ("mx32", 2, "function"),
    ],
)  # fmt: skip
def test_codes_and_scales_of_a_checkpoint_are_taken_as_they_are(
    scheme: str, tp: int, form: str, tmp_path: Path
) -> None:
    state = whole_state(scheme)
    source = save(tmp_path / "source", state, tp, form)
    recipe = Recipe(target="hf", quant=QUANTS[scheme])
    report = convert_checkpoint(source, tmp_path / "out", recipe)
    assert report.codes == {"kept": 4, "dequantised": 0}
    verify_checkpoint(tmp_path / "out", source)
    assert_as_in_memory(tmp_path / "out", state, recipe)


def test_the_unified_checkpoint_takes_them_too(tmp_path: Path) -> None:
    state = whole_state("tensor")
    source = save(tmp_path / "source", state, 2)
    recipe = Recipe(tp_size=2, quant="fp8", scales={"*": {"input": 1.0}})
    report = convert_checkpoint(source, tmp_path / "out", recipe)
    assert report.codes == {"kept": 4, "dequantised": 0}
    verify_checkpoint(tmp_path / "out", source)
    assert_as_in_memory(tmp_path / "out", state, recipe)


@pytest.mark.parametrize(
    ("scheme", "quant", "kept"),
    [("block128", "none", 0), ("mx32", "fp8-row", 0), ("block128", "fp8-block", 3)],
)
def test_others_are_dequantised(scheme: str, quant: str, kept: int, tmp_path: Path) -> None:
    state = whole_state(scheme)
    source = save(tmp_path / "source", state, 2)
    exclude = ("lm_head", "*.o_proj") if kept else ("lm_head",)
    recipe = Recipe(target="hf", quant=quant, exclude=exclude)
    report = convert_checkpoint(source, tmp_path / "out", recipe)
    assert report.codes == {"kept": kept, "dequantised": 4 - kept}
    verify_checkpoint(tmp_path / "out", source)
    assert_as_in_memory(tmp_path / "out", state, recipe)


def test_blocks_that_end_within_a_shard_are_refused(tmp_path: Path) -> None:
    """384 rows of gate on two ranks: a rank's 192 rows have blocks of their own."""
    linear = f"{LAYER}mlp.linear_fc1.weight"
    for rank in range(2):
        weight, _ = te.blockwise(384, HIDDEN)
        model = {linear: pickled(weight)}
        save_rank(tmp_path / f"mp_rank_{rank:02d}", model, argparse.Namespace(swiglu=True))
    with pytest.raises(UnsupportedOptionError, match=r"linear_fc1.*blocks of 128 × 128 end within"):
        open_source(tmp_path)


def test_shards_with_scales_of_their_own_are_refused(tmp_path: Path) -> None:
    linear = f"{LAYER}mlp.linear_fc2.weight"
    for rank in range(2):
        weight = te.Float8Tensor(te.codes(4, 4), torch.tensor([1.0 + rank]))
        save_rank(tmp_path / f"mp_rank_{rank:02d}", {linear: pickled(weight)}, FACTS)
    with pytest.raises(ScaleError, match=r"linear_fc2.*scales of their own, 1\.0 to 2\.0"):
        open_source(tmp_path)


def test_shards_of_different_kinds_are_refused(tmp_path: Path) -> None:
    linear = f"{LAYER}mlp.linear_fc2.weight"
    weights = (pickled(te.Float8Tensor(te.codes(4, 4), torch.ones(1))), torch.ones(4, 4))
    for rank, weight in enumerate(weights):
        save_rank(tmp_path / f"mp_rank_{rank:02d}", {linear: weight}, FACTS)
    with pytest.raises(ShapeError, match=r"linear_fc2.*others not"):
        open_source(tmp_path)


def test_other_tensors_of_transformer_engine_are_named(tmp_path: Path) -> None:
    weight = pickled(te.Float8Tensor(te.codes(4, 4), torch.ones(1)), "function", "NVFP4Tensor")
    save_rank(tmp_path / "mp_rank_00", {f"{LAYER}mlp.linear_fc2.weight": weight}, FACTS)
    with pytest.raises(UnsupportedOptionError, match=r"linear_fc2.*_make_nvfp4_tensor.*bf16"):
        open_source(tmp_path)


class Attribute:
    """Pickles to a look-up of any attribute."""

    def __init__(self, owner: object, name: str) -> None:
        self.call = getattr, (owner, name)

    def __reduce__(self) -> Any:
        return self.call


def test_no_other_attribute_is_looked_up(tmp_path: Path) -> None:
    weight = pickled(te.Float8Tensor(te.codes(4, 4), torch.ones(1)))
    for number, owner in enumerate((torch.Size, type(weight), argparse.Namespace)):
        path = tmp_path / str(number)
        model = {"w": weight, "x": Attribute(owner, "__init__")}
        save_rank(path / "mp_rank_00", model, FACTS)
        with pytest.raises(UnsafeSourceError, match="asks for the attribute '__init__'"):
            open_source(path)


def test_a_chunk_in_fp8_is_named(tmp_path: Path) -> None:
    weight = pickled(te.Float8Tensor(te.codes(4, 4), torch.ones(1)), "function")
    file = tmp_path / "chunk"
    with te_pickles.registered([weight]):
        torch.save(weight, file)
    handle = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(FuseportError, match=r"here: stored in fp8 .*--ckpt-format torch"):
            find_payload(Window(handle, 0, file.stat().st_size), "here")
    finally:
        os.close(handle)
