import argparse
import collections
import os
import pickle
from pathlib import Path

import pytest
import torch
from fuseport_testing.te_states import Call
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from fuseport.converter.errors import CorruptSourceError, SourceError, UnsafeSourceError
from fuseport.converter.sources.safe_pickle import Inert, PickledTensor, load_pickle, pickled_tensor


def test_plain_data_comes_through():
    data = {
        "list": [1, 2.5, None, True, b"x"],
        "set": {1, 2},
        "ordered": collections.OrderedDict(a=1),
        "size": torch.Size([2, 3]),
        "dtype": torch.float8_e4m3fn,
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = load_pickle(
            pickle.dumps({k: v for k, v in data.items() if k != "list"}, protocol), "t"
        )
        assert loaded == {k: v for k, v in data.items() if k != "list"}
    assert load_pickle(pickle.dumps(data["list"]), "t") == data["list"]


def test_namespace_is_inert():
    loaded = load_pickle(pickle.dumps(argparse.Namespace(a=1, b="c")), "t")
    assert isinstance(loaded, Inert)
    assert loaded.path == "argparse.Namespace"
    assert loaded.fields == {"a": 1, "b": "c"}


def test_dcp_classes_are_not_constructed():
    index, properties = load_pickle(
        pickle.dumps((MetadataIndex("k", (1, 2)), TensorProperties())), "t"
    )
    assert isinstance(index, Inert)
    assert index.fields["fqn"] == "k"
    assert tuple(index.fields["offset"]) == (1, 2)
    assert properties.state[0] is torch.float32


@pytest.mark.parametrize("name", ["megatron.core.enums.Kind", "transformer_engine.recipe.Format"])
def test_foreign_classes_become_stubs(name):
    module, _, kind = name.rpartition(".")
    loaded = load_pickle(f"c{module}\n{kind}\n(I3\ntR(dS'x'\nI1\nsb.".encode(), "t")
    assert loaded.path == name
    assert loaded.args == (3,)
    assert loaded.fields == {"x": 1}
    assert repr(loaded) == f"<{name}>"


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {mark}",), "system"),
        (eval, ("open('{mark}', 'w')",), "builtins.eval"),
        (getattr, (os, "name"), "builtins.getattr"),
        (Path, ("x",), "pathlib"),
        (torch.load, ("x",), "torch.serialization.load"),
        (bytearray, (1 << 40,), "builtins.bytearray"),
    ],
)
def test_calls_are_refused_by_name(tmp_path, function, args, name):
    mark = tmp_path / "mark"
    args = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in args)
    if function is getattr:
        data = b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR."
    elif function is Path:
        data = b"cpathlib\nPath.home\n(tR."
    else:
        data = pickle.dumps(Call(function, *args))
    with pytest.raises(UnsafeSourceError, match=name):
        load_pickle(data, "file")
    assert not mark.exists()


def test_dotted_names_do_not_reach_into_allowed_ones():
    data = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    with pytest.raises(UnsafeSourceError, match="fromkeys"):
        load_pickle(data, "file")


def test_state_set_on_a_class_stays_in_its_load():
    name = "ctorch.distributed.checkpoint.metadata\nMetadata\n"
    with pytest.raises(CorruptSourceError):
        load_pickle(f"{name}(N(dS'__setstate__'\nI1\nstb.".encode(), "t")
    assert not hasattr(torch.distributed.checkpoint.metadata.Metadata, "__setstate__")
    assert callable(Inert.__setstate__)


@pytest.mark.parametrize("data", [b"", b"\x80", b"abc", b"N", b"(lp0\n", b"\x80\x04]\x94(K"])
def test_damage_is_named(data):
    with pytest.raises(CorruptSourceError, match="file: not a readable pickle"):
        load_pickle(data, "file")


def test_size_is_capped():
    with pytest.raises(CorruptSourceError, match="at most 10"):
        load_pickle(pickle.dumps("x" * 100), "file", limit=10)


def test_tensor_description():
    plain = PickledTensor(torch.float32, (2, 1, 3), (3, 99, 1), 0, "0", 24)
    assert plain.plain
    assert not PickledTensor(torch.float32, (2, 3), (1, 2), 0, "0", 24).plain
    assert not PickledTensor(torch.float32, (2, 3), (3, 1), 3, "0", 48).plain
    with pytest.raises(SourceError, match="not a plain dense tensor"):
        pickled_tensor({"a": 1}, "file")
