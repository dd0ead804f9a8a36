"""Files of a source that have one another's names."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from fuseport_testing.hf_tiny import write_hf_tiny
from fuseport_testing.tiny import write_tiny
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from fuseport.converter import Recipe, convert_checkpoint
from fuseport.converter.errors import CorruptSourceError
from fuseport.converter.sources.source import open_source


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_shards_of_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", 2)
    swap(*sorted(source.glob("*.safetensors")))
    with pytest.raises(CorruptSourceError, match="lacks tensor"):
        convert_checkpoint(source, tmp_path / "out", Recipe(target="hf"))
    assert sorted(os.listdir(tmp_path)) == ["s"]


def test_shards_of_a_torch_dist_checkpoint(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "s")
    (iteration,) = (one for one in source.iterdir() if one.is_dir())
    state = {}
    for stored in open_source(source).stored.values():
        state[stored.name] = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read_flat(0, stored.numel, state[stored.name].view(-1))
    (iteration / "__0_0.distcp").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(iteration, thread_count=2), no_dist=True)
    convert_checkpoint(source, tmp_path / "good", Recipe())
    swap(*sorted(iteration.glob("*.distcp")))
    with pytest.raises(CorruptSourceError):
        convert_checkpoint(source, tmp_path / "out", Recipe())
    assert sorted(os.listdir(tmp_path)) == ["good", "s"]
