import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import signal
import warnings
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fuseport_testing.te_states import Call
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from fuseport.converter.errors import CorruptSourceError, SourceError, UnsafeSourceError
from fuseport.converter.sources.torch_dist import read_torch_dist


def save(state, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)


def write_metadata(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def save_chunks(folder, tensors):
    """Write `tensors` (key → whole, boxes) as a sharded run would: a file for every other chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, storage = {}, {}
    for key, (whole, boxes) in tensors.items():
        chunks = []
        for number, (offset, extent) in enumerate(boxes):
            name = f"__{number % 2}_0.distcp"
            part = whole[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))]
            with (folder / name).open("ab") as file:
                start = file.tell()
                torch.save(part.clone(), file)
                info = _StorageInfo(name, start, file.tell() - start)
            storage[MetadataIndex(key, offset, number)] = info
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(extent)))
        properties = TensorProperties(dtype=whole.dtype)
        entries[key] = TensorStorageMetadata(properties, whole.shape, chunks)
    write_metadata(folder, Metadata(entries, None, storage))


BOXES = [((r, c), (3, 5)) for r in (0, 3) for c in (0, 5)]


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of one tensor "w" [6, 10] in four chunks; returns directory and tensor."""
    whole = torch.arange(60.0).view(6, 10)
    save_chunks(tmp_path / "ckpt", {"w": (whole, BOXES)})
    return tmp_path / "ckpt", whole


def load(stored):
    out = torch.empty(stored.numel, dtype=stored.dtype)
    stored.read_flat(0, stored.numel, out)
    return out.view(stored.shape)


def edit(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    write_metadata(folder, metadata)


def change_info(folder, **fields):
    """Change the storage entry of the chunk at (0, 0)."""

    def change(metadata):
        index = MetadataIndex("w", (0, 0))
        metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **fields)

    edit(folder, change)


def change_chunk(folder, number, offsets, sizes):
    def change(metadata):
        chunks = metadata.state_dict_metadata["w"].chunks
        old = MetadataIndex("w", chunks[number].offsets)
        chunks[number] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        metadata.storage_data[MetadataIndex("w", offsets)] = metadata.storage_data[old]

    edit(folder, change)


def replace_chunk(folder, write):
    """Put a new file, made by `write(path)`, in the place of the chunk at (0, 0)."""
    path = folder / "new.distcp"
    write(path)
    change_info(folder, relative_path=path.name, offset=0, length=path.stat().st_size)


def rezip(source, target, change, compression=zipfile.ZIP_STORED):
    """Copy a zip; `change(name, data)` gives the records to write for each record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            for name, data in change(info.filename, old.read(info)):
                new.writestr(name, data)


def test_what_torch_saves_is_read_back(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]
    state = {str(dtype): torch.randn(5, 7).abs().to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 4), "view": torch.randn(9, 4)[2:5]}
    save(state, tmp_path)
    read = read_torch_dist(tmp_path)
    assert read.tensors.keys() == state.keys()
    assert read.origin == tmp_path
    assert read.facts == {}
    for name, tensor in state.items():
        assert read.tensors[name].shape == tuple(tensor.shape)
        assert load(read.tensors[name]).equal(tensor)


def test_chunks_are_put_together(sharded):
    folder, whole = sharded
    stored = read_torch_dist(folder).tensors["w"]
    assert len(stored.pieces) == 4
    assert load(stored).equal(whole)
    out = torch.empty(33)
    stored.read_flat(7, 40, out)
    assert out.equal(whole.reshape(-1)[7:40])


def test_plans_that_megatron_keeps_in_the_metadata_are_skipped(sharded):
    folder, whole = sharded
    index = MetadataIndex("w", (0, 0))
    data = TensorWriteData(ChunkStorageMetadata(torch.Size([0]), torch.Size([1])), None, None)
    items = [WriteItem(index, WriteItemType.SHARD, None, data)]
    edit(folder, lambda m: setattr(m, "all_local_plans", [SavePlan(items)]))
    assert load(read_torch_dist(folder).tensors["w"]).equal(whole)


def test_zip64_is_read(sharded):
    folder, whole = sharded

    def write(path):
        whole_part = whole[:3, :5].clone()
        torch.save(whole_part, folder / "plain")
        with zipfile.ZipFile(folder / "plain") as old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                with new.open(info.filename, "w", force_zip64=True) as record:
                    record.write(old.read(info))

    replace_chunk(folder, write)
    assert load(read_torch_dist(folder).tensors["w"]).equal(whole)


def test_other_state_is_ignored_by_name(tmp_path):
    state = {
        "decoder.final_layernorm.weight": torch.ones(4),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(4),
        "chained_0.optimizer.state.exp_avg.w": torch.ones(4, dtype=torch.float64),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1": b"x",
        "rng_state/shard_0.0_1.1": [1],
        "note": "text",
    }
    save(state, tmp_path)
    read = read_torch_dist(tmp_path)
    assert list(read.tensors) == ["decoder.final_layernorm.weight"]
    assert {
        key.rpartition(".")[2]: value for key, value in read.ignored.items() if "opt" in key
    } == {
        "weight": "optimizer state",
        "w": "optimizer state",
    }
    reasons = {value for key, value in read.ignored.items() if "opt" not in key}
    assert reasons == {
        "extra state of a module",
        "random number generator state",
        "an object, not a tensor",
    }


def test_latest_iteration_is_found(tmp_path):
    for name, value in {"iter_0000002": 2.0, "iter_0000010": 10.0, "release": 0.5}.items():
        save({"w": torch.tensor(value)}, tmp_path / name)

    def value():
        return load(read_torch_dist(tmp_path).tensors["w"]).item()

    assert value() == 10.0
    for text, expected in {"2": 2.0, "release\n": 0.5, "10\n": 10.0}.items():
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert value() == expected
    assert load(read_torch_dist(tmp_path / "iter_0000002").tensors["w"]).item() == 2.0
    for text, error in {
        "../x": CorruptSourceError,
        "7": SourceError,
        "": CorruptSourceError,
    }.items():
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(error, match="latest_checkpointed_iteration"):
            read_torch_dist(tmp_path)


def test_facts_from_common_pt(tmp_path):
    save({"w": torch.ones(1)}, tmp_path)
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, exit_signal=signal.SIGTERM)
    torch.save({"args": args, "iteration": 3, "t": torch.ones(3)}, tmp_path / "common.pt")
    facts = read_torch_dist(tmp_path).facts
    assert facts["num_layers"] == 2
    assert facts["params_dtype"] is torch.bfloat16
    torch.save({"args": args, "x": Call(os.system, "true")}, tmp_path / "common.pt")
    with pytest.raises(UnsafeSourceError, match="system"):
        read_torch_dist(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_facts_from_run_config(tmp_path, beside):
    folder = tmp_path / "iter_0000001"
    save({"w": torch.ones(1)}, folder)
    mark = tmp_path / "mark"
    text = f"""
model:
  _target_: os.system
  num_layers: 4
  kind: !!python/object/apply:os.system ["touch {mark}"]
  tagged: !megatron.Thing {{a: 1}}
"""
    ((tmp_path if beside else folder) / "run_config.yaml").write_text(text)
    facts = read_torch_dist(folder).facts
    assert facts["num_layers"] == 4
    assert facts["tagged"] == {"a": 1}
    assert facts["kind"] == [f"touch {mark}"]
    assert not mark.exists()


@pytest.mark.parametrize("text", ["model: [", "model: {a: !!python/name:os.system }", "- 1"])
def test_odd_run_config(tmp_path, text):
    save({"w": torch.ones(1)}, tmp_path)
    (tmp_path / "run_config.yaml").write_text(text)
    if text.endswith("["):
        with pytest.raises(CorruptSourceError, match="run_config"):
            read_torch_dist(tmp_path)
    else:
        assert all(value == "" for value in read_torch_dist(tmp_path).facts.values())


@pytest.mark.parametrize(
    ("backend", "error", "match"),
    [
        ("torch_dist", None, ""),
        ("zarr", SourceError, "zarr.*torch_dist"),
        ("fsdp_dtensor", SourceError, "FSDP"),
        ("other", SourceError, "'other' is not known"),
        (None, CorruptSourceError, "sharded_backend"),
    ],
)
def test_metadata_json(sharded, backend, error, match):
    text = json.dumps({"sharded_backend": backend}) if backend else "{"
    (sharded[0] / "metadata.json").write_text(text)
    if error is None:
        read_torch_dist(sharded[0])
    else:
        with pytest.raises(error, match=match):
            read_torch_dist(sharded[0])


def test_other_directories_say_what_they_are(tmp_path):
    with pytest.raises(SourceError, match=r"no \.metadata file"):
        read_torch_dist(tmp_path)
    with pytest.raises(SourceError, match="no such directory"):
        read_torch_dist(tmp_path / "none")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".zarray").write_text("{}")
    with pytest.raises(SourceError, match="zarr"):
        read_torch_dist(tmp_path)
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(SourceError, match="mp_rank"):
        read_torch_dist(tmp_path)


def test_code_in_metadata_is_not_run(sharded, tmp_path):
    mark = tmp_path / "mark"
    edit(sharded[0], lambda m: setattr(m, "planner_data", Call(os.system, f"touch {mark}")))
    with pytest.raises(UnsafeSourceError, match="system"):
        read_torch_dist(sharded[0])
    assert not mark.exists()


def test_code_in_a_chunk_is_not_run(sharded, tmp_path):
    mark = tmp_path / "mark"
    evil = pickle.dumps(Call(os.system, f"touch {mark}"), 2)

    def write(path):
        torch.save(torch.zeros(3, 5), tmp_path / "good")
        rezip(
            tmp_path / "good",
            path,
            lambda name, data: [(name, evil if name.endswith("data.pkl") else data)],
        )

    replace_chunk(sharded[0], write)
    with pytest.raises(UnsafeSourceError, match="system"):
        read_torch_dist(sharded[0])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../out.distcp", "sub/../../out.distcp", "/{abs}", "link.distcp"])
def test_files_outside_are_refused(sharded, tmp_path, name):
    folder = sharded[0]
    shutil.copy(folder / "__0_0.distcp", tmp_path / "out.distcp")
    (folder / "link.distcp").symlink_to(tmp_path / "out.distcp")
    (folder / "sub").mkdir()
    change_info(folder, relative_path=name.format(abs=str(tmp_path / "out.distcp").lstrip("/")))
    with pytest.raises(UnsafeSourceError, match="outside the checkpoint"):
        read_torch_dist(folder)


def test_links_inside_are_followed(sharded, tmp_path):
    folder, whole = sharded
    (folder / "__0_0.distcp").rename(folder / "moved")
    (folder / "__0_0.distcp").symlink_to("moved")
    (tmp_path / "alias").symlink_to(folder)
    assert load(read_torch_dist(tmp_path / "alias").tensors["w"]).equal(whole)


@pytest.mark.parametrize(
    ("number", "offsets", "sizes", "match"),
    [
        (1, (0, 4), (3, 5), "overlap"),
        (1, (0, 6), (3, 4), "holes"),
        (1, (0, 5), (6, 5), "overlap"),
        (1, (0, 6), (3, 5), "not inside"),
        (1, (0, -5), (3, 5), "not inside"),
        (1, (0,), (15,), "not inside"),
    ],
)
def test_chunks_that_do_not_tile(sharded, number, offsets, sizes, match):
    change_chunk(sharded[0], number, offsets, sizes)
    with pytest.raises(CorruptSourceError, match=f"w.*{match}"):
        read_torch_dist(sharded[0])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"offset": -1}, "truncated"),
        ({"length": 1 << 40}, "truncated"),
        ({"length": 0}, "truncated"),
        ({"length": 100}, "damaged"),
        ({"offset": 1}, "no torch.save zip"),
        ({"offset": 1.5}, "storage entry"),
        ({"relative_path": 3}, "storage entry"),
        ({"relative_path": "none.distcp"}, "missing"),
        ({"relative_path": "."}, "missing"),
        ({"transform_descriptors": ["zstd"]}, "stored through"),
        ({"relative_path": "x.safetensors"}, "safetensors"),
    ],
)
def test_wrong_storage_entries(sharded, fields, match):
    change_info(sharded[0], **fields)
    with pytest.raises(SourceError, match=match):
        read_torch_dist(sharded[0])


def test_truncated_shard(sharded):
    path = sharded[0] / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptSourceError, match=r"__1_0\.distcp.*'w'.*truncated"):
        read_torch_dist(sharded[0])


def test_zeroed_shard(sharded):
    path = sharded[0] / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptSourceError, match=r"__1_0\.distcp.*no torch.save zip"):
        read_torch_dist(sharded[0])


def test_missing_storage_entry(sharded):
    edit(sharded[0], lambda m: m.storage_data.pop(MetadataIndex("w", (0, 0))))
    with pytest.raises(CorruptSourceError, match="no storage entry"):
        read_torch_dist(sharded[0])


def test_two_storage_entries(sharded):
    metadata = pickle.loads((sharded[0] / ".metadata").read_bytes())
    info = next(iter(metadata.storage_data.values()))
    metadata.storage_data = {MetadataIndex("w", (0, 0)): info, MetadataIndex("w", (1, 1)): info}
    # No dict holds two equal keys; their pickle can.
    data = pickle.dumps(metadata, 2)
    assert b"K\x01K\x01\x86" in data
    (sharded[0] / ".metadata").write_bytes(data.replace(b"K\x01K\x01\x86", b"K\x00K\x00\x86"))
    with pytest.raises(CorruptSourceError, match="two storage entries"):
        read_torch_dist(sharded[0])


@pytest.mark.parametrize(
    ("change", "compression", "match"),
    [
        (lambda n, d: [(n, d)], zipfile.ZIP_DEFLATED, "not stored"),
        (lambda n, d: [(n, d[:-4] if n.endswith("/0") else d)], 0, "bytes of data, expected 60"),
        (lambda n, d: [(n, d + d if n.endswith("/0") else d)], 0, "bytes of data, expected 60"),
        (
            lambda n, d: [(n, d)] + [("x/data/1", d)] * n.endswith("/0"),
            0,
            "one data record, found 2",
        ),
        (lambda n, d: [] if n.endswith("/0") else [(n, d)], 0, "one data record, found 0"),
        (lambda n, d: [(n[:-1] + "7" if n.endswith("/0") else n, d)], 0, "not there"),
        (lambda n, d: [] if n.endswith("data.pkl") else [(n, d)], 0, "one record 'data.pkl'"),
        (lambda n, d: [(n, b"big" if n.endswith("byteorder") else d)], 0, "little-endian"),
        (lambda n, d: [(n, bytes(1 << 17) if n.endswith(".pkl") else d)], 0, "bytes long"),
    ],
)
def test_zips_that_are_not_as_saved(sharded, tmp_path, change, compression, match):
    torch.save(torch.zeros(3, 5), tmp_path / "good")
    replace_chunk(sharded[0], lambda path: rezip(tmp_path / "good", path, change, compression))
    with pytest.raises(SourceError, match=match):
        read_torch_dist(sharded[0])


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(3, 5, dtype=torch.int32), "holds torch.int32"),
        (torch.zeros(5, 3), r"holds torch.float32 \(5, 3\)"),
        (torch.zeros(5, 3).t(), "not contiguous"),
        (torch.zeros(20)[5:].view(3, 5), "bytes of data"),
        (torch.zeros(3, 5).to_sparse(), "one data record"),
        ([1, 2], "one data record"),
    ],
)
def test_chunks_that_are_not_as_stated(sharded, tensor, match):
    replace_chunk(sharded[0], lambda path: torch.save(tensor, path))
    with pytest.raises(SourceError, match=match):
        read_torch_dist(sharded[0])


def test_unusable_dtype(tmp_path):
    save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path)
    with pytest.raises(SourceError, match=r"'w'.*complex64"):
        read_torch_dist(tmp_path)


def test_huge_metadata_is_not_read(sharded):
    os.truncate(sharded[0] / ".metadata", 1 << 40)
    with pytest.raises(CorruptSourceError, match="at most"):
        read_torch_dist(sharded[0])


@pytest.mark.parametrize("value", [{}, [], Metadata(None), Metadata({"w": 1}, None, {})])
def test_metadata_of_another_kind(sharded, value):
    write_metadata(sharded[0], value)
    with pytest.raises(CorruptSourceError, match="metadata"):
        read_torch_dist(sharded[0])


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bits_end_in_a_named_error_or_change_nothing_else(sharded, seed):
    folder, _ = sharded
    generator = torch.Generator().manual_seed(seed)
    path = [folder / ".metadata", folder / "__0_0.distcp"][seed % 2]
    data = bytearray(path.read_bytes())
    for position in torch.randint(len(data), (5,), generator=generator).tolist():
        data[position] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))
    with contextlib.suppress(SourceError):
        read_torch_dist(folder)


def test_thousands_of_chunks_are_quick(tmp_path):
    whole = torch.arange(3000.0).view(3000, 1)
    save_chunks(tmp_path, {"w": (whole, [((r, 0), (1, 1)) for r in range(3000)])})
    assert load(read_torch_dist(tmp_path).tensors["w"]).equal(whole)
