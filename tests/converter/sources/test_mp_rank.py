import argparse
import collections
import enum
import os
import random
import sys
import types
from itertools import product

import numpy as np
import pytest
import torch
from fuseport_testing.te_states import Call

from fuseport.converter.errors import (
    CorruptSourceError,
    MissingTensorError,
    ShapeError,
    SourceError,
    UnknownTensorError,
    UnsafeSourceError,
    UnsupportedOptionError,
)
from fuseport.converter.sources.merge_shards import merge_shards
from fuseport.converter.sources.mp_rank import read_mp_rank

H, F, V, HEADS = 8, 12, 16, 4
LAYER = "decoder.layers.{}."


def load(stored):
    out = torch.empty(stored.numel, dtype=stored.dtype)
    stored.read_flat(0, stored.numel, out)
    return out.view(stored.shape)


def column(whole, tp, size):
    return whole.chunk(size)[tp]


def row(whole, tp, size):
    return whole.chunk(size, 1)[tp]


def gated(whole, tp, size):
    gate, up = whole.chunk(2)
    return torch.cat([gate.chunk(size)[tp], up.chunk(size)[tp]])


def same(whole, _tp, _size):
    return whole


def dense_layer():
    """Name → (whole tensor, how a rank's shard is made)."""
    return {
        "input_layernorm.weight": (torch.randn(H), same),
        "self_attention.linear_qkv.weight": (torch.randn(2 * H, H), column),
        "self_attention.linear_qkv.bias": (torch.randn(2 * H), column),
        "self_attention.linear_proj.weight": (torch.randn(H, H), row),
        "self_attention.linear_proj.bias": (torch.randn(H), same),
        "self_attention.q_layernorm.weight": (torch.randn(2), same),
        "mlp.linear_fc1.layer_norm_weight": (torch.randn(H), same),
        "mlp.linear_fc1.weight": (torch.randn(2 * F, H), gated),
        "mlp.linear_fc1.bias": (torch.randn(2 * F), gated),
        "mlp.linear_fc2.weight": (torch.randn(H, F), row),
        "mlp.linear_fc2.bias": (torch.randn(H), same),
    }


def whole_model(layers, layer=dense_layer):
    model = {"embedding.word_embeddings.weight": (torch.randn(V, H).bfloat16(), column)}
    for number in range(layers):
        model |= {LAYER.format(number) + name: made for name, made in layer().items()}
    model["decoder.final_layernorm.weight"] = (torch.randn(H), same)
    model["output_layer.weight"] = (torch.randn(V, H), column)
    return model


def shards_of(model, tp):
    return {
        (t, 0, 0): {name: cut(whole, t, tp) for name, (whole, cut) in model.items()}
        for t in range(tp)
    }


def args(**more):
    values = {"swiglu": True, "untie_embeddings_and_output_weights": True}
    return argparse.Namespace(**values | more)


def write(root, name, models, facts, **more):
    folder = root / name
    folder.mkdir(parents=True)
    torch.save({"args": facts, "checkpoint_version": 3.0, **models, **more}, folder / FILE)


FILE = "model_optim_rng.pt"


def write_ranks(root, model, layers, tp, pp=1, vp=1, ep=1):
    """Save `model` as the ranks of a run would: layers numbered from 0 in each chunk."""
    per_chunk = layers // (pp * vp)
    facts = args(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        num_layers_per_virtual_pipeline_stage=per_chunk if vp > 1 else None,
    )
    for t, p, e in product(range(tp), range(pp), range(ep)):
        chunks = {}
        for c in range(vp):
            first = (c * pp + p) * per_chunk
            chunk = collections.OrderedDict()
            for name, (whole, cut) in model.items():
                chunk_name = local_name(
                    name, first, per_chunk, (p, c) == (0, 0), (p, c) == (pp - 1, vp - 1)
                )
                if chunk_name:
                    chunk[chunk_name] = cut(whole, t, tp).clone()
            chunks["model" if vp == 1 else f"model{c}"] = chunk
        name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (pp > 1) + f"_{e:03d}" * (ep > 1)
        write(root, name, chunks, facts)


def local_name(name, first, count, is_first, is_last):
    if name.startswith("embedding"):
        return name if is_first else None
    if not name.startswith("decoder.layers."):
        return name if is_last else None
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    inside = first <= int(number) < first + count
    return f"decoder.layers.{int(number) - first}.{rest}" if inside else None


def check(merged, model):
    assert merged.keys() == model.keys()
    for name, (whole, _) in model.items():
        assert merged[name].shape == tuple(whole.shape), name
        assert merged[name].dtype == whole.dtype
        assert load(merged[name]).equal(whole), name


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 1},
        {"tp": 2},
        {"tp": 4, "pp": 2},
        {"tp": 1, "pp": 2, "vp": 2},
        {"tp": 2, "pp": 2, "vp": 2},
    ],
)
def test_ranks_become_the_whole_model(tmp_path, sizes):
    model = whole_model(4)
    write_ranks(tmp_path / "iter_0000005", model, 4, **sizes)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    read = read_mp_rank(tmp_path)
    assert read.origin == tmp_path / "iter_0000005"
    assert read.facts["num_layers"] == 4
    assert len(read.shards) == sizes["tp"] * sizes.get("pp", 1)
    check(merge_shards(read.shards, read.facts), model)


def test_uneven_stages_and_wrappers(tmp_path):
    model = whole_model(3)
    facts = args(num_layers=3, pipeline_model_parallel_size=2)
    for p, (first, count) in enumerate([(0, 1), (1, 2)]):
        names = {n: local_name(n, first, count, p == 0, p == 1) for n in model}
        chunk = {f"module.{new}": model[old][0] for old, new in names.items() if new}
        write(tmp_path, f"mp_rank_00_{p:03d}", {"model": chunk}, facts)
    read = read_mp_rank(tmp_path)
    check(merge_shards(read.shards, read.facts), model)


def test_random_ranges_of_sharded_tensors():
    model = whole_model(1)
    merged = merge_shards(shards_of(model, 4), {"swiglu": True})
    for name, (whole, _) in model.items():
        numbers = random.Random(name)
        for _ in range(20):
            start, stop = sorted(numbers.choices(range(whole.numel() + 1), k=2))
            out = torch.empty(stop - start, dtype=whole.dtype)
            merged[name].read_flat(start, stop, out)
            assert out.equal(whole.reshape(-1)[start:stop])


def test_ungated_fc1_is_cut_plainly():
    whole = torch.randn(2 * F, H)
    shards = shards_of({"decoder.layers.0.mlp.linear_fc1.weight": (whole, column)}, 2)
    merged = merge_shards(shards, {"swiglu": False})
    assert load(merged["decoder.layers.0.mlp.linear_fc1.weight"]).equal(whole)
    with pytest.raises(UnsupportedOptionError, match="swiglu"):
        merge_shards(shards, {})


E, TOP = 4, "decoder.layers.0.mlp."


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    "spelling", ["local_experts.{e}.linear_fc{n}.weight", "linear_fc{n}.weight{e}"]
)
def test_experts_get_global_numbers(tp, ep, spelling):
    def name(expert, number):
        return TOP + "experts." + spelling.format(e=expert, n=number)

    first = [torch.randn(2 * F, H) for _ in range(E)]
    second = [torch.randn(H, F) for _ in range(E)]
    router = torch.randn(E, H)
    shards = {}
    for t, r in product(range(tp), range(ep)):
        shards[t, 0, r] = {TOP + "router.weight": router}
        for e in range(E // ep):
            whole = r * (E // ep) + e
            shards[t, 0, r][name(e, 1)] = gated(first[whole], t, tp)
            shards[t, 0, r][name(e, 2)] = row(second[whole], t, tp)
    merged = merge_shards(shards, {"swiglu": True, "num_experts": E})
    assert len(merged) == 2 * E + 1
    for e in range(E):
        assert load(merged[name(e, 1)]).equal(first[e])
        assert load(merged[name(e, 2)]).equal(second[e])


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_legacy_grouped_experts(tp, ep, is_gated):
    width = 2 * F if is_gated else F
    first, second = torch.randn(E, H, width), torch.randn(E, F, H)
    shards = {}
    for t, r in product(range(tp), range(ep)):
        one, two = first.chunk(ep)[r], second.chunk(ep)[r].chunk(tp, 1)[t]
        halves = one.chunk(2, 2) if is_gated else (one,)
        one = torch.cat([half.chunk(tp, 2)[t] for half in halves], 2)
        shards[t, 0, r] = {
            TOP + "experts.weight1": one.contiguous().view(H, -1),
            TOP + "experts.weight2": two.contiguous().view(-1, H),
        }
    merged = merge_shards(shards, {"swiglu": is_gated, "num_experts": E})
    assert load(merged[TOP + "experts.weight1"]).equal(first.reshape(H, -1))
    assert load(merged[TOP + "experts.weight2"]).equal(second.reshape(-1, H))


def test_expert_ranks_are_told_from_pipeline_ranks(tmp_path):
    model = {f"{TOP}experts.local_experts.0.linear_fc2.weight": (torch.randn(H, F), same)}
    facts = args(expert_model_parallel_size=2, pipeline_model_parallel_size=1, num_experts=2)
    for r in range(2):
        chunk = {name: whole + r for name, (whole, _) in model.items()}
        write(tmp_path, f"mp_rank_00_{r:03d}", {"model": chunk}, facts)
    read = read_mp_rank(tmp_path)
    assert sorted(read.shards) == [(0, 0, 0), (0, 0, 1)]
    assert len(merge_shards(read.shards, read.facts)) == 2


def test_tied_output_must_equal_the_embedding():
    embedding = torch.randn(V, H)
    shards = {
        (t, p, 0): {
            ["embedding.word_embeddings.weight", "output_layer.weight"][p]: embedding.chunk(2)[
                t
            ].clone()
        }
        for t, p in product(range(2), range(2))
    }
    facts = {"untie_embeddings_and_output_weights": False}
    assert list(merge_shards(shards, facts)) == ["embedding.word_embeddings.weight"]
    assert len(merge_shards(shards, {})) == 2
    shards[1, 1, 0]["output_layer.weight"][0, 0] += 1
    with pytest.raises(CorruptSourceError, match=r"output_layer.*\(1, 0, 0\) and \(1, 1, 0\)"):
        merge_shards(shards, facts)
    assert len(merge_shards(shards, {"untie_embeddings_and_output_weights": True})) == 2


@pytest.mark.parametrize("rank", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_copies_must_be_bit_equal(rank):
    shards = {
        r: {"decoder.final_layernorm.weight": torch.tensor([float("nan"), 0.0])}
        for r in product(range(2), repeat=3)
    }
    assert load(merge_shards(shards, {})["decoder.final_layernorm.weight"]).isnan()[0]
    shards[rank]["decoder.final_layernorm.weight"] = torch.tensor([float("nan"), -0.0])
    with pytest.raises(CorruptSourceError, match=r"final_layernorm.*\(0, 0, 0\) and") as caught:
        merge_shards(shards, {})
    assert str(rank) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("decoder.layers.0.self_attention.unheard_of.weight", UnknownTensorError),
        ("decoder.layers.0.mlp.linear_fc3.weight", UnknownTensorError),
    ],
)
def test_unknown_names_are_refused(name, error):
    with pytest.raises(error, match=name):
        merge_shards({(0, 0, 0): {name: torch.ones(2)}}, {})


def test_shards_that_do_not_fit():
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    with pytest.raises(ShapeError, match=name):
        merge_shards(
            {(0, 0, 0): {name: torch.ones(2, 2)}, (1, 0, 0): {name: torch.ones(4, 2)}},
            {"swiglu": 1},
        )
    with pytest.raises(ShapeError, match="halved"):
        merge_shards({(t, 0, 0): {name: torch.ones(3, 2)} for t in range(2)}, {"swiglu": 1})
    with pytest.raises(ShapeError, match="dtypes"):
        merge_shards(
            {(0, 0, 0): {name: torch.ones(2, 2)}, (1, 0, 0): {name: torch.ones(2, 2).half()}},
            {"swiglu": 1},
        )
    with pytest.raises(MissingTensorError, match=r"tensor-parallel ranks \[1\]"):
        merge_shards({(0, 0, 0): {name: torch.ones(2, 2)}, (1, 0, 0): {}}, {"swiglu": 1})
    with pytest.raises(MissingTensorError, match="ranks"):
        merge_shards({(0, 0, 0): {}, (1, 1, 0): {}}, {})
    with pytest.raises(UnsupportedOptionError, match="expert_tensor_parallel_size"):
        merge_shards(
            {(0, 0, 0): {}, (1, 0, 0): {}}, {"num_experts": 2, "expert_tensor_parallel_size": 1}
        )


def test_missing_rank(tmp_path):
    write_ranks(tmp_path, whole_model(2), 2, tp=2, pp=2)
    (tmp_path / "mp_rank_01_000" / FILE).unlink()
    with pytest.raises(SourceError, match=r"mp_rank_01_000.*missing"):
        read_mp_rank(tmp_path)
    (tmp_path / "mp_rank_01_000").rmdir()
    with pytest.raises(SourceError, match="tensor rank 1, pipeline rank 0"):
        read_mp_rank(tmp_path)
    with pytest.raises(SourceError, match="no mp_rank"):
        read_mp_rank(tmp_path / "mp_rank_00_000")


def test_missing_last_stage_shows_in_the_layer_count(tmp_path):
    write_ranks(tmp_path, whole_model(2), 2, tp=1, pp=2)
    (tmp_path / "mp_rank_00_001").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingTensorError, match="1 layers, the arguments say 2"):
        read_mp_rank(tmp_path)


def test_virtual_chunks_need_their_arguments(tmp_path):
    chunks = {
        f"model{c}": {"decoder.layers.0.input_layernorm.weight": torch.ones(2)} for c in range(2)
    }
    write(tmp_path, "mp_rank_00", chunks, args(num_layers=2))
    with pytest.raises(UnsupportedOptionError, match="num_layers_per_virtual_pipeline_stage"):
        read_mp_rank(tmp_path)


def test_missing_layer(tmp_path):
    model = {f"decoder.layers.{n}.input_layernorm.weight": torch.ones(2) for n in (0, 2)}
    write(tmp_path, "mp_rank_00", {"model": model}, args())
    with pytest.raises(MissingTensorError, match=r"layers \[0, 2\]"):
        read_mp_rank(tmp_path)


@pytest.mark.parametrize(
    ("models", "match"),
    [
        ({}, "expected 'model'"),
        ({"model": 3}, "expected a dict"),
        ({"model1": {}}, "expected 'model'"),
        ({"model": {"language_model": {"encoder": torch.ones(1)}}}, "nested dict"),
        ({"model": {"w": 3}}, "'w' is a int"),
    ],
)
def test_files_of_another_shape(tmp_path, models, match):
    write(tmp_path, "mp_rank_00", models, args())
    with pytest.raises(SourceError, match=match):
        read_mp_rank(tmp_path)


def test_other_state_is_ignored(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.fake")

    class Kind(enum.Enum):
        ONE = 1

    Kind.__module__, Kind.__qualname__ = "megatron.fake", "Kind"
    module.Kind = Kind
    if "megatron" not in sys.modules:
        monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.fake", module)
    model = {
        "decoder.final_layernorm.weight": torch.ones(2),
        "decoder.layers.0.mlp.linear_fc1._extra_state": torch.ones(2, dtype=torch.uint8),
        "decoder.layers.0.mlp.linear_fc2._extra_state": None,
    }
    rng = [{"random": random.getstate(), "np": np.random.get_state(), "cuda": torch.ones(2)}]
    write(
        tmp_path, "mp_rank_00", {"model": model}, args(kind=Kind.ONE), rng_state=rng, optimizer={}
    )
    read = read_mp_rank(tmp_path)
    assert list(read.shards[0, 0, 0]) == ["decoder.final_layernorm.weight"]
    assert read.ignored["optimizer"] == "optimizer state"
    assert read.ignored["rng_state"] == "random number generator state"
    assert sum("extra state" in reason for reason in read.ignored.values()) == 2
    assert repr(read.facts["kind"]) == "<megatron.fake.Kind>"
    assert read.facts["kind"].args == (1,)


def test_code_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    write(tmp_path, "mp_rank_00", {"model": {}}, args(), x=Call(os.system, f"touch {mark}"))
    with pytest.raises(UnsafeSourceError, match="system"):
        read_mp_rank(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_damaged_file(tmp_path, size):
    write(tmp_path, "mp_rank_00", {"model": {"w": torch.ones(1000)}}, args())
    os.truncate(tmp_path / "mp_rank_00" / FILE, size)
    with pytest.raises(CorruptSourceError, match="mp_rank_00"):
        read_mp_rank(tmp_path)
