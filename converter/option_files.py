"""What options of the command line name: facts, architectures and scales in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .choices import FROM_SOURCE
from .errors import RecipeError
from .hf_family import make_family
from .scales import read_scales


def read_facts(file: Path | None, pairs: list[str] | None) -> dict[str, Any]:
    """Facts of a YAML file, then those of the command line."""
    facts: dict[str, Any] = {}
    if file is not None:
        facts |= _read_yaml(file, "--spec")
    for pair in pairs or []:
        name, _, text = pair.partition("=")
        value = _yaml(text, f"--fact {pair!r}")
        if not name or value is None:
            raise RecipeError(f"--fact {pair!r}: expected NAME=VALUE")
        facts[name] = value
    return facts


def read_scale_option(given: str | None) -> Mapping[str, Mapping[str, float]] | str | None:
    """What `--scales` names: a file's entries, or the source's own."""
    if given is None or given == FROM_SOURCE:
        return given
    return read_scales(Path(given)).entries


def read_family(file: Path | None) -> dict[str, Any] | None:
    """The contents of an architecture's table; checked, so that a mistake is named as its own."""
    if file is None:
        return None
    table = _read_yaml(file, "--family")
    make_family(table, str(file))
    return table


def _read_yaml(file: Path, option: str) -> dict[str, Any]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{option} {file} cannot be read: {error}") from error
    values = _yaml(text, f"{option} {file}")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{option} {file}: expected lines of 'name: value'")
    return values


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    # Tags and deep nesting make yaml raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{what} cannot be read as YAML: {reason}") from error
