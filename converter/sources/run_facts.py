"""The training run's arguments, read as data from whatever the checkpoint keeps them in."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import CorruptSourceError
from .safe_pickle import Inert
from .torch_zip import read_saved_object

_MAX_YAML_BYTES = 16 * 2**20


class _DataLoader(yaml.SafeLoader):
    """YAML in which an unknown tag is ignored and its node is plain data."""


def _untagged(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_DataLoader.add_constructor(None, _untagged)


def read_facts(root: Path) -> dict[str, object]:
    """`common.pt`'s args, or the `model` section of `run_config.yaml` in or beside `root`.

    Values may be `Inert` where the run used its own enums. Empty if neither file is there.
    Raises UnsafeSourceError or CorruptSourceError for a file that cannot be trusted or read.
    """
    common = root / "common.pt"
    if common.is_file():
        with common.open("rb") as file:
            args = namespace(read_saved_object(file, str(common)), "args")
        if args:
            return args
    for folder in (root, root.parent):
        config = folder / "run_config.yaml"
        if config.is_file():
            return _model_section(config)
    return {}


def namespace(saved: object, key: str) -> dict[str, object]:
    """The attributes of the `argparse.Namespace` (or the dict) at `saved[key]`; else empty.

    A process that has imported Megatron-Core gets a real Namespace, since Megatron allows torch
    to build it; elsewhere it is inert.
    """
    value = saved.get(key) if isinstance(saved, dict) else None
    found = value.fields if isinstance(value, Inert) else value
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    return {str(name): item for name, item in found.items()} if isinstance(found, dict) else {}


def _model_section(path: Path) -> dict[str, object]:
    if os.path.getsize(path) > _MAX_YAML_BYTES:
        raise CorruptSourceError(f"{path}: larger than {_MAX_YAML_BYTES} bytes")
    try:
        # A subclass of SafeLoader that builds plain data only.
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_DataLoader)
    # Tags and deep nesting make yaml raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CorruptSourceError(f"{path}: not readable as YAML ({reason})") from error
    return namespace(config, "model")
