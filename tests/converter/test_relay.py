"""fp8 weights of training in memory: copied where the target's scheme is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fuseport_testing import te_tensors as te

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.errors import FuseportWarning, ScaleError, UnsupportedOptionError

E4M3 = torch.float8_e4m3fn
HEADS, GROUPS, HEAD, HIDDEN, FFN = 4, 2, 128, 256, 384
LAYER = "decoder.layers.0."
LINEARS = {
    "self_attention.linear_qkv": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
    "self_attention.linear_proj": (HIDDEN, HEADS * HEAD),
    "mlp.linear_fc1": (2 * FFN, HIDDEN),
    "mlp.linear_fc2": (HIDDEN, FFN),
}
Array = npt.NDArray[Any]


def spec(**changes: Any) -> ModelSpec:
    facts = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
             "num_query_groups": GROUPS, "kv_channels": HEAD, "ffn_hidden_size": FFN}  # fmt: skip
    return ModelSpec(**(facts | changes))


def plain(linears: dict[str, Any]) -> dict[str, Any]:
    """A model's state with these linears."""
    sizes = {"embedding.word_embeddings.weight": (32, HIDDEN), "output_layer.weight": (32, HIDDEN)}
    norms = ("decoder.final_layernorm.weight", f"{LAYER}input_layernorm.weight",
             f"{LAYER}pre_mlp_layernorm.weight")  # fmt: skip
    state: dict[str, Any] = {name: torch.randn(size) for name, size in sizes.items()}
    state |= {name: torch.ones(HIDDEN) for name in norms}
    return state | {f"{LAYER}{name}.weight": value for name, value in linears.items()}


def stored(scheme: str) -> dict[str, Any]:
    """Linear → one of Transformer Engine's tensors, and its values [o, i] by another route."""
    made: dict[str, Any] = {}
    for number, (name, (rows, columns)) in enumerate(LINEARS.items()):
        if scheme == "tensor":
            scale = torch.tensor([0.5 + number])
            raw = te.codes(rows, columns)
            made[name] = te.Float8Tensor(raw, scale), decoded(raw) * scale.numpy()
        elif scheme == "block128":
            weight, real = te.blockwise(rows, columns)
            wide = np.kron(real.numpy(), np.ones((128, 128), np.float32))
            made[name] = weight, decoded(weight._rowwise_data) * wide
        else:
            swizzlable, powers = te.mx(rows, columns)
            wide = np.exp2(powers.numpy().astype(np.float32) - 127).repeat(32, 1)
            made[name] = swizzlable, decoded(swizzlable._rowwise_data) * wide
    return made


def decoded(codes: torch.Tensor) -> Array:
    raw = codes.view(torch.uint8).numpy()
    values: Array = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def by_hand(values: dict[str, Array]) -> dict[str, Array]:
    """What each module of the Hugging Face layout holds."""
    groups = values["self_attention.linear_qkv"].reshape(GROUPS, -1, HEAD, HIDDEN)
    gate, up = np.split(values["mlp.linear_fc1"], 2)
    return {
        "self_attn.q_proj": groups[:, :-2].reshape(-1, HIDDEN),
        "self_attn.k_proj": groups[:, -2].reshape(-1, HIDDEN),
        "self_attn.v_proj": groups[:, -1].reshape(-1, HIDDEN),
        "self_attn.o_proj": values["self_attention.linear_proj"],
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": values["mlp.linear_fc2"],
    }


WIDE: dict[str, tuple[str, Callable[[Array, tuple[int, ...]], Array]]] = {
    "fp8": ("weight_scale", lambda s, shape: s),
    "fp8-block": (
        "weight_scale_inv",
        lambda s, shape: np.kron(s, np.ones((128, 128), np.float32))[: shape[0], : shape[1]],
    ),
    "mxfp8": ("weight_scale", lambda s, shape: np.exp2(s.astype(np.float32) - 127).repeat(32, 1)),
}


@pytest.mark.parametrize(
    ("scheme", "quant"), [("tensor", "fp8"), ("block128", "fp8-block"), ("mx32", "mxfp8")]
)
def test_codes_and_scales_are_taken_as_they_are(scheme: str, quant: str) -> None:
    made = stored(scheme)
    state = plain({name: weight for name, (weight, _) in made.items()})
    (found,) = convert_state_dict(state, spec(), Recipe(target="hf", quant=quant))
    codes = by_hand({name: _raw(weight) for name, (weight, _) in made.items()})
    values = by_hand({name: values for name, (_, values) in made.items()})
    suffix, wide = WIDE[quant]
    for part in codes:
        module = f"model.layers.0.{part}"
        weight = found[f"{module}.weight"]
        assert weight.dtype is E4M3
        assert np.array_equal(weight.view(torch.uint8).numpy(), codes[part]), part
        scale = wide(found[f"{module}.{suffix}"].numpy(), codes[part].shape)
        assert np.array_equal(decoded(weight) * scale, values[part]), part


def _raw(weight: Any) -> Array:
    raw = weight._data if hasattr(weight, "_data") else weight._rowwise_data
    taken: Array = raw.numpy()
    return taken


@pytest.mark.parametrize("tp", [1, 2])
def test_the_unified_checkpoint_takes_scales_of_tensors(tp: int) -> None:
    made = stored("tensor")
    state = plain({name: weight for name, (weight, _) in made.items()})
    recipe = Recipe(tp_size=tp, quant="fp8", scales={"*": {"input": 1.0}})
    ranks = convert_state_dict(state, spec(), recipe)
    parts = by_hand({name: _raw(weight) for name, (weight, _) in made.items()})
    qkv = [np.split(parts[f"self_attn.{one}_proj"], tp) for one in "qkv"]
    for rank, found in enumerate(ranks):
        module = "transformer.layers.0.attention.qkv"
        raw = found[f"{module}.weight"].view(torch.uint8).numpy()
        assert np.array_equal(raw, np.concatenate([each[rank] for each in qkv]))
        assert found[f"{module}.weights_scaling_factor"].tolist() == [0.5]
        assert found["transformer.layers.0.mlp.gate.weights_scaling_factor"].tolist() == [2.5]


def test_weights_of_one_buffer_are_told_apart() -> None:
    made = stored("tensor")
    buffer = torch.cat([weight._data.flatten() for weight, _ in made.values()])
    sizes = [rows * columns for rows, columns in LINEARS.values()]
    views = dict(zip(made, buffer.split(sizes), strict=True))
    state = plain(
        {
            name: te.Float8Tensor(views[name].view(LINEARS[name]), weight._scale_inv)
            for name, (weight, _) in made.items()
        }
    )
    (found,) = convert_state_dict(state, spec(), Recipe(target="hf", quant="fp8"))
    for part, expected in by_hand({n: _raw(weight) for n, (weight, _) in made.items()}).items():
        raw = found[f"model.layers.0.{part}.weight"].view(torch.uint8).numpy()
        assert np.array_equal(raw, expected)


def test_blocks_that_straddle_heads_are_quantised_again() -> None:
    """Heads of 64 rows: a block of 128 source rows holds two heads."""
    made = stored("block128")
    state = plain({name: weight for name, (weight, _) in made.items()})
    changed = spec(kv_channels=64, num_attention_heads=8, num_query_groups=4)
    with pytest.warns(FuseportWarning, match=r"1 of 4 fp8 weights .*linear_qkv.* \(block128\)"):
        (found,) = convert_state_dict(state, changed, Recipe(target="hf", quant="fp8-block"))
    values = made["self_attention.linear_qkv"][1].reshape(4, 4, 64, HIDDEN)
    k = found["model.layers.0.self_attn.k_proj.weight"]
    scale = WIDE["fp8-block"][1](
        found["model.layers.0.self_attn.k_proj.weight_scale_inv"].numpy(), k.shape
    )
    exact = values[:, 2].reshape(-1, HIDDEN)
    block = np.abs(exact).reshape(2, 128, 2, 128).max((1, 3))
    assert np.array_equal(scale[::128, ::128], (block / np.float32(448)).astype(np.float32))
    down = found["model.layers.0.mlp.down_proj.weight"].view(torch.uint8).numpy()
    assert np.array_equal(down, _raw(made["mlp.linear_fc2"][0]))


@pytest.mark.parametrize(("quant", "suffix"), [("none", ""), ("fp8-row", "weight_scale")])
def test_another_scheme_is_dequantised_and_said(quant: str, suffix: str) -> None:
    made = stored("tensor")
    state = plain({name: weight for name, (weight, _) in made.items()})
    recipe = Recipe(target="hf", quant=quant, dtype="float32")
    with pytest.warns(FuseportWarning, match="4 of 4 fp8 weights of the source are dequantised"):
        (found,) = convert_state_dict(state, spec(), recipe)
    exact = made["mlp.linear_fc2"][1]
    name = "model.layers.0.mlp.down_proj"
    if quant == "none":
        assert np.array_equal(found[f"{name}.weight"].numpy(), exact)
    else:
        scale = np.abs(exact).max(1, keepdims=True) / np.float32(448)
        assert np.array_equal(found[f"{name}.{suffix}"].numpy(), scale)


def test_excluded_weights_are_dequantised() -> None:
    made = stored("tensor")
    state = plain({name: weight for name, (weight, _) in made.items()})
    exclude = ("lm_head", "*.o_proj")
    recipe = Recipe(target="hf", quant="fp8", exclude=exclude, dtype="float32")
    with pytest.warns(FuseportWarning, match="1 of 4 fp8 weights .*linear_proj"):
        (found,) = convert_state_dict(state, spec(), recipe)
    exact = made["self_attention.linear_proj"][1]
    assert np.array_equal(found["model.layers.0.self_attn.o_proj.weight"].numpy(), exact)
    assert found["model.layers.0.mlp.up_proj.weight"].dtype is E4M3


def test_two_scales_for_one_weight_are_refused() -> None:
    state = plain({name: weight for name, (weight, _) in stored("tensor").items()})
    given = {"*.o_proj": {"weight": 1.0}}
    with pytest.raises(ScaleError, match="o_proj is given, but the source stores"):
        convert_state_dict(state, spec(), Recipe(target="hf", quant="fp8", scales=given))


def test_codes_without_scales_are_refused() -> None:
    state = plain({name: torch.zeros(shape) for name, shape in LINEARS.items()})
    name = f"{LAYER}mlp.linear_fc2.weight"
    state[name] = state[name].to(E4M3)
    with pytest.raises(UnsupportedOptionError, match=r"linear_fc2\.weight has dtype"):
        convert_state_dict(state, spec(), Recipe(target="hf", quant="fp8"))
