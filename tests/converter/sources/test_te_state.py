"""Transformer Engine's module state, of every version, crafted and damaged."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import types

import pytest
import torch
from fuseport_testing import te_states as te
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseport.converter.errors import (
    CorruptSourceError,
    ScaleError,
    SourceError,
    UnsafeSourceError,
    UnsupportedOptionError,
)
from fuseport.converter.sources.safe_pickle import load_pickle
from fuseport.converter.sources.te_state import MAX_STATE_BYTES, decode_te_state, join

VERSIONS = {
    "1.9": te.saved(te.state_1()),
    "1.13, onnx": te.byte_tensor(te.state_1()),
    "1.14": te.byte_tensor(te.state_1()),
    "2.0": te.byte_tensor(te.state_2()),
    "2.18": te.byte_tensor(te.state_2()),
}


def fp32(value):
    return torch.tensor(value).item()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(version):
    state = decode_te_state(VERSIONS[version], "m")
    expected = te.scales()
    assert torch.equal(state.scale_fwd, expected["scale_fwd"])
    assert torch.equal(state.scale_inv_fwd, 1 / expected["scale_fwd"])
    assert torch.equal(state.amax_history_fwd, expected["amax_history_fwd"])
    assert state.gemms == 1
    assert state.input() == fp32(1 / 2)
    assert state.weight() == fp32(1 / 20)


def test_a_state_pickled_beside_megatron(monkeypatch):
    """Megatron-Core 0.19 replaces torch's function, and pickles then bear the new one's name."""

    def safe_load_from_bytes(data):
        raise AssertionError("nothing is run")

    module = types.ModuleType("megatron.core.safe_globals")
    module.safe_load_from_bytes = safe_load_from_bytes
    safe_load_from_bytes.__module__ = module.__name__
    safe_load_from_bytes.__qualname__ = "safe_load_from_bytes"
    for name in ("megatron", "megatron.core", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
    pickled = te.byte_tensor(te.state_2())
    assert b"safe_load_from_bytes" in pickled.numpy().tobytes()
    assert decode_te_state(pickled, "m").weight() == fp32(1 / 20)


def test_the_reciprocal_of_old_versions_is_taken_as_it_is():
    inverse = torch.tensor([0.3, 0.7, 1.0])
    state = decode_te_state(te.byte_tensor(te.state_1(scale_inv_fwd=inverse)), "m")
    assert (state.input(), state.weight()) == (fp32(0.3), fp32(0.7))


def test_all_forms_of_bytes():
    whole = te.byte_tensor(te.state_2())
    data = whole.numpy().tobytes()
    forms = [data, bytearray(data), io.BytesIO(data), whole, whole[:, None].expand(-1, 2)[:, 0]]
    # A checkpoint's byte entries are saved once more.
    forms += [te.saved(whole), te.saved(te.saved(te.state_1())), te.saved(io.BytesIO(data))]
    forms += [load_pickle(pickle.dumps(io.BytesIO(data)), "t")]
    for form in forms:
        assert decode_te_state(form, "m").weight() == fp32(1 / 20)


@pytest.mark.parametrize(
    "empty",
    [
        None,
        b"",
        io.BytesIO(),
        torch.empty(0, dtype=torch.uint8),
        te.saved(None),
        te.byte_tensor(None),
        te.byte_tensor({}),
        te.byte_tensor({"recipe": te.MXFP8BlockScaling(), "extra_fp8_variables": te.extras(1)}),
    ],
)
def test_states_without_scales(empty):
    assert decode_te_state(empty, "m") is None


@pytest.mark.parametrize("order", ["by_kind", "by_gemm"])
@pytest.mark.parametrize("gemms", [1, 2, 3, 8])
def test_both_orders_of_a_grouped_linear(order, gemms):
    state = decode_te_state(te.byte_tensor(te.state_2(gemms, order)), "m")
    for gemm in range(gemms):
        assert state.input(gemm) == fp32(1 / (2 + gemm))
        assert state.weight(gemm) == fp32(1 / (20 + 10 * gemm))


@pytest.mark.parametrize("order", ["by_kind", "by_gemm"])
def test_an_expert_without_tokens_keeps_the_order(order):
    scales = te.scales(4, order)
    place = 2 if order == "by_kind" else 6
    scales["amax_history_fwd"][:, place] = 0
    state = decode_te_state(te.byte_tensor(te.state_2(4, order, **scales)), "m")
    # Its scale is from before the history begins.
    assert state.input(2) == fp32(1 / 4)


def test_an_order_that_does_not_show_is_not_guessed():
    hidden = te.state_2(2, "by_kind", amax_history_fwd=torch.zeros(16, 6))
    with pytest.raises(ScaleError, match="m: the order of 2 × 3 scales"):
        decode_te_state(te.byte_tensor(hidden), "m").weight()
    everywhere = te.state_2(2, "by_kind", amax_history_fwd=torch.ones(16, 6))
    with pytest.raises(ScaleError, match=r"by_gemm since.* give the scales yourself"):
        decode_te_state(te.byte_tensor(everywhere), "m").weight()
    # All weights were seen in one order only, but one of its outputs was, too.
    history = torch.tensor([1.0, 1, 1, 1, 0, 1]).expand(16, -1).contiguous()
    with pytest.raises(ScaleError, match="the order"):
        decode_te_state(te.byte_tensor(te.state_2(2, amax_history_fwd=history)), "m").weight()


@pytest.mark.parametrize("order", ["by_kind", "by_gemm"])
def test_pieces_of_a_grouped_linear_are_joined(order):
    whole = te.state_2(3, order)
    pieces = [decode_te_state(te.byte_tensor(one), "m") for one in te.split(whole, 3)]
    state = join(pieces)
    assert torch.equal(state.scale_fwd, whole["scale_fwd"])
    assert torch.equal(state.amax_history_fwd, whole["amax_history_fwd"])
    assert [state.weight(gemm) for gemm in range(3)] == [fp32(1 / w) for w in (20, 30, 40)]
    with pytest.raises(CorruptSourceError, match="do not belong together"):
        join([state, *pieces])


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-40, float("inf"), float("nan"), 1e38])
def test_unusable_scales_are_named(bad):
    # 1 / 1e38 is subnormal.
    scale = torch.tensor([2.0, bad, float("nan")])
    state = decode_te_state(te.byte_tensor(te.state_2(scale_fwd=scale)), "m")
    assert state.input() == 0.5
    with pytest.raises(ScaleError, match="m: the scale of the weight of gemm 0 is"):
        state.weight()


def test_a_scale_that_was_never_set_is_named():
    fresh = te.state_2(scale_fwd=torch.ones(3), amax_history_fwd=torch.zeros(16, 3))
    with pytest.raises(ScaleError, match="the input of gemm 0 was never set"):
        decode_te_state(te.byte_tensor(fresh), "m").input()
    # An amax of NaN or inf is not taken up, but the scale had been.
    history = torch.full((16, 3), float("nan"))
    state = decode_te_state(te.byte_tensor(te.state_2(amax_history_fwd=history)), "m")
    assert state.weight() == fp32(1 / 20)


def test_a_gemm_that_is_not_there():
    state = decode_te_state(te.byte_tensor(te.state_2()), "m")
    with pytest.raises(IndexError):
        state.weight(1)


CALLS = [
    te.Call(os.system, "touch {mark}"),
    te.Call(eval, "open('{mark}', 'w')"),
    te.Call(builtins.exec, "open('{mark}', 'w')"),
    te.Call(torch.load, "{mark}"),
    te.Call(getattr, "x", "upper"),
]


def armed(call, mark):
    function, args = call.call
    return te.Call(function, *(a.format(mark=mark) if isinstance(a, str) else a for a in args))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.call[0].__name__)
@pytest.mark.parametrize("place", ["alone", "scale", "extra", "nested"])
@pytest.mark.parametrize("form", [te.byte_tensor, te.saved])
def test_nothing_is_run(tmp_path, call, place, form):
    mark = tmp_path / "mark"
    call = armed(call, mark)
    state = te.state_2()
    if place == "alone":
        state = call
    elif place == "nested":
        # A storage's own file asks for the call.
        load = torch.storage._load_from_bytes
        storage = te.Call(load, pickle.dumps(call, 2) * 5)
        state["scale_fwd"] = te.Call(
            torch._utils._rebuild_tensor_v2, storage, 0, (3,), (1,), False, {}
        )
    else:
        state["scale_fwd" if place == "scale" else "extra_fp8_variables"] = call
    with pytest.raises((UnsafeSourceError, CorruptSourceError)) as caught:
        decode_te_state(form(state), "m")
    # Within torch.save, a storage's file is not a storage: it is not even looked into.
    assert place == "nested" or isinstance(caught.value, UnsafeSourceError)
    assert not mark.exists()


class FromBytes:
    """A storage as torch pickles it, by the function of the moment: Megatron-Core replaces it."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def rebuilt(data, shape=(3,), stride=(1,), offset=0):
    rebuild = torch._utils._rebuild_tensor_v2
    return te.Call(rebuild, FromBytes(data), offset, shape, stride, False, {})


THREE = struct.pack("<3f", 2, 20, 1)


def storage_bytes(claimed=3, counted=3, data=THREE, magic=None):
    """A storage in the format from before zips, with what it says of itself."""
    parts = [0x1950A86A20F9469CFC6C if magic is None else magic, 1001, {"little_endian": True}]
    described = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{claimed}\nNtQ.".encode()
    pickles = [pickle.dumps(part, 2) for part in parts] + [described, pickle.dumps(["0"], 2)]
    return b"".join(pickles) + struct.pack("<q", counted) + data


def test_a_storage_written_by_hand_is_read():
    state = te.state_2(scale_fwd=rebuilt(storage_bytes()))
    assert decode_te_state(te.byte_tensor(state), "m").weight() == fp32(1 / 20)


@pytest.mark.parametrize(
    "tensor",
    [
        rebuilt(storage_bytes(claimed=1 << 40)),
        rebuilt(storage_bytes(claimed=1 << 40, counted=1 << 40)),
        rebuilt(storage_bytes(claimed=-3, counted=-3)),
        rebuilt(storage_bytes(data=b"")),
        rebuilt(storage_bytes(magic=1)),
        rebuilt(b""),
        rebuilt(3),
        rebuilt(storage_bytes(), shape=(1 << 40,), stride=(0,)),
        rebuilt(storage_bytes(), shape=(-3,)),
        rebuilt(storage_bytes(), shape=(1 << 70, 0), stride=(1, 1)),
        rebuilt(storage_bytes(), stride=(7,)),
        rebuilt(storage_bytes(), stride=(-1,)),
        rebuilt(storage_bytes(), offset=1 << 40),
        rebuilt(storage_bytes(), offset=-1),
        rebuilt(storage_bytes(), shape=(1,)),
        torch.ones(3, dtype=torch.float64),
        torch.ones(0),
        torch.ones(4),
        torch.ones(1, 3),
        [2.0, 20.0, 1.0],
        None,
    ],
)
def test_absurd_tensors_are_named(tensor):
    with pytest.raises(SourceError, match=r"^m: "):
        decode_te_state(te.byte_tensor(te.state_2(scale_fwd=tensor)), "m")


def test_a_tensor_that_repeats_its_storage_is_not_made():
    scale = rebuilt(storage_bytes(), shape=(3000,), stride=(0,))
    with pytest.raises(CorruptSourceError, match=r"a tensor \(3000,\) has 12 bytes"):
        decode_te_state(te.byte_tensor(te.state_2(scale_fwd=scale)), "m")


@pytest.mark.parametrize(
    "replaced",
    [
        {"amax_history_fwd": torch.ones(16, 4)},
        {"amax_history_fwd": torch.ones(3)},
        {"scale_inv_fwd": torch.ones(6)},
        {"extra_fp8_variables": {"num_gemms": 2}},
        {"extra_fp8_variables": {"num_gemms": 0}},
    ],
)
def test_parts_that_do_not_fit_are_named(replaced):
    with pytest.raises(CorruptSourceError, match="m: expected three scales for each gemm"):
        decode_te_state(te.byte_tensor(te.state_2(**replaced)), "m")


def test_other_things_are_named():
    with pytest.raises(UnsupportedOptionError, match="fused operation"):
        decode_te_state(te.byte_tensor({"forward": te.state_2(), "backward": {}}), "m")
    with pytest.raises(SourceError, match="found int"):
        decode_te_state(3, "m")
    with pytest.raises(SourceError, match="found Tensor"):
        decode_te_state(torch.ones(3), "m")
    with pytest.raises(SourceError, match="found list"):
        decode_te_state(te.byte_tensor([1]), "m")
    with pytest.raises(CorruptSourceError, match="a state within a state"):
        decode_te_state(te.saved(te.saved(te.saved(te.saved(te.state_1())))), "m")
    without = {key: value for key, value in te.state_2().items() if key != "amax_history_fwd"}
    with pytest.raises(CorruptSourceError, match="amax_history_fwd is missing"):
        decode_te_state(te.byte_tensor(without), "m")


def test_size_is_capped():
    with pytest.raises(CorruptSourceError, match=f"at most {MAX_STATE_BYTES}"):
        decode_te_state(torch.zeros(1, dtype=torch.uint8).expand(MAX_STATE_BYTES + 1), "m")


def test_absurd_object_numbers_do_not_fill_the_memory():
    with pytest.raises(CorruptSourceError, match="object number"):
        decode_te_state(b"\x80\x04Nr\xff\xff\xff\xff.", "m")


WHOLE = {name: bytes(te.byte_tensor(te.state_2()).tolist()) for name in ("pickle",)}
WHOLE["zip"] = te.saved(te.state_1()).getvalue()


@pytest.mark.parametrize("form", WHOLE)
def test_truncated_states_are_named(form):
    data = WHOLE[form]
    for length in range(1, len(data), 7):
        with pytest.raises(SourceError):
            decode_te_state(data[:length], "m")


def decodes_or_is_named(data):
    try:
        state = decode_te_state(data, "m")
        if state is not None:
            state.weight()
    except (SourceError, ScaleError, UnsupportedOptionError):
        pass


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=300, deadline=5000)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8))
def test_changed_bytes_end_in_named_errors(form, changes):
    data = bytearray(WHOLE[form])
    for position, value in changes:
        data[position % len(data)] = value
    decodes_or_is_named(bytes(data))


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x04", b"PK\x03\x04"]))
def test_any_bytes_end_in_named_errors(data, start):
    decodes_or_is_named(start + data)
