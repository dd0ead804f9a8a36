"""Quantisation scales that are given: by module, from a user's file or from training.

Every value is a dequant_scale, which multiplies after decoding: amax / 448 for e4m3.

A file is either JSON,

    {"model.layers.*.mlp.down_proj": {"weight": 0.01, "input": 0.2}}

or safetensors with fp32 tensors of one element, named `{module}.weight_scale`,
`{module}.input_scale`, `{module}.kv_cache_scale`, `{module}.k_scale` and `{module}.v_scale`.
A module is the target's name of a linear, with layers numbered as in the whole model, or a
pattern (`*`, `?`, `[…]`). An exact name goes before patterns, and a pattern with more literal
characters before one with fewer; each kind of scale is looked up by itself.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import CorruptSourceError, ScaleError, SourceError
from .facts import plain

MAX_FILE_BYTES = 64 * 2**20
_TINY = float(np.finfo(np.float32).tiny)
_WILDCARD = re.compile(r"\[[^]]+\]|[*?]")


@dataclass(frozen=True)
class ModuleScales:
    """The dequant_scales of one module; None where there is none.

    weight, input: of a linear. kv_cache: of keys and values together; k, v: of each.
    """

    weight: float | None = None
    input: float | None = None
    kv_cache: float | None = None
    k: float | None = None
    v: float | None = None

    def larger(self, other: ModuleScales) -> ModuleScales:
        """For each kind the larger scale, with which neither's values saturate."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return ModuleScales(
            *(max((s for s in pair if s is not None), default=None) for pair in pairs)
        )


KINDS = tuple(field.name for field in fields(ModuleScales))


class ScaleTable:
    """Scales by module's name or pattern; remembers which entries matched a module.

    Args:
        entries: name or pattern → scales.
        origin: what messages call the table.

    Raises:
        ScaleError: a scale is not finite, normal and positive in fp32.
    """

    def __init__(self, entries: Mapping[str, ModuleScales], origin: str) -> None:
        self.origin = origin
        self._entries = {
            (name, kind): usable(value, f"{origin}: {kind} of {name}")
            for name, scales in entries.items()
            for kind, value in asdict(scales).items()
            if value is not None
        }
        # Names are looked up: a table may have one for each of thousands of experts.
        self._patterns = [key for key in self._entries if not set(key[0]).isdisjoint("*?[")]
        self._matched: set[tuple[str, str]] = set()

    @property
    def entries(self) -> dict[str, dict[str, float]]:
        """All scales by name or pattern and kind, as JSON has them."""
        found: dict[str, dict[str, float]] = {}
        for (name, kind), value in self._entries.items():
            found.setdefault(name, {})[kind] = value
        return found

    def module(self, name: str) -> ModuleScales:
        """The scales for the module called `name`.

        Raises:
            ScaleError: two patterns are equally exact.
        """
        return ModuleScales(**{kind: self.find(name, kind) for kind in KINDS})

    def find(self, name: str, kind: str) -> float | None:
        """One kind of scale; raises as `module` does."""
        matches = {
            key for key in self._patterns if key[1] == kind and fnmatch.fnmatchcase(name, key[0])
        }
        if (name, kind) in self._entries:
            matches.add((name, kind))
        if not matches:
            return None
        self._matched.update(matches)
        best = max(_exactness(pattern, name) for pattern, _ in matches)
        chosen = sorted(key for key in matches if _exactness(key[0], name) == best)
        if len(chosen) > 1:
            raise ScaleError(
                f"{self.origin}: {kind} of {name} is given by {chosen[0][0]} and as exactly by "
                f"{chosen[1][0]}; keep one of them, or add {name} itself"
            )
        return self._entries[chosen[0]]

    def unused(self) -> list[str]:
        """The entries that matched no module so far, as "kind of name"."""
        return [f"{kind} of {name}" for name, kind in self._entries.keys() - self._matched]

    def check_used(self) -> None:
        """Raise ScaleError if an entry matched no module: to be called when all were looked up."""
        left = sorted(self.unused())
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ScaleError(
                f"{self.origin}: no module is quantised with {', '.join(left[:5])}{more}; check "
                f"the names against the target's, or remove the entries"
            )


def _exactness(pattern: str, name: str) -> tuple[bool, int]:
    return pattern == name, len(_WILDCARD.sub("", pattern))


def usable(value: object, what: str) -> float:
    """The value as fp32 has it.

    Raises:
        ScaleError: it is no number, or not finite, normal and positive in fp32.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ScaleError(f"{what} is {type(value).__name__}, expected a number")
    try:
        with np.errstate(over="ignore", under="ignore"):
            rounded = float(np.float32(value))
    except OverflowError:
        rounded = math.inf
    if not _TINY <= rounded < math.inf:
        raise ScaleError(f"{what} is {value}, expected a finite, normal and positive fp32 number")
    return rounded


def read_scales(path: str | Path) -> ScaleTable:
    """Read a user's file of scales, `.json` or `.safetensors`.

    Raises:
        SourceError: it is not there, or of another kind. CorruptSourceError: damaged or too big.
        ScaleError: it has unknown keys, or a scale that cannot be used.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise SourceError(f"{path}: expected a file named *{' or *'.join(_READERS)}")
    # A pipe would be waited for without end.
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give a file of scales")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CorruptSourceError(f"{path}: {size} bytes; at most {MAX_FILE_BYTES} are read")
    return ScaleTable(reader(path), str(path))


def table_of(entries: object, origin: str) -> ScaleTable:
    """A table from what a JSON file holds.

    Raises:
        ScaleError: as `read_scales`.
    """
    if not isinstance(entries, Mapping):
        raise ScaleError(
            f"{origin} must be a mapping such as {{'*.mlp.down_proj': {{'weight': 0.01}}}}, or "
            f"'source', found {entries!r:.100}; of a file it is what json.load, or "
            f"fuseport.converter.scales.read_scales(PATH).entries, makes of it"
        )
    return ScaleTable(_modules(entries, origin), origin)


def _read_json(path: Path) -> dict[str, ModuleScales]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        """A dict; json would keep the last of two entries of one name."""
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ScaleError(f"{path}: {twice} is there twice; keep one of them")
        return found

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=once)
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptSourceError(f"{path}: not readable as JSON ({error})") from error
    return _modules(content, str(path))


def _modules(entries: object, origin: str) -> dict[str, ModuleScales]:
    if not isinstance(entries, Mapping):
        raise ScaleError(f"{origin}: expected an object of modules, found {type(entries).__name__}")
    return {str(name): _module(one, f"{origin}: {name}") for name, one in entries.items()}


def _module(scales: object, what: str) -> ModuleScales:
    if not isinstance(scales, Mapping) or not scales:
        raise ScaleError(
            f'{what} must be an object such as {{"weight": 0.01}}, found {scales!r:.100}'
        )
    unknown = sorted(scales.keys() - set(KINDS), key=str)
    if unknown:
        raise ScaleError(f"{what} has {unknown[0]}, which is none of {', '.join(KINDS)}")
    return ModuleScales(**{kind: usable(v, f"{what}: {kind}") for kind, v in scales.items()})


def _read_safetensors(path: Path) -> dict[str, ModuleScales]:
    found: dict[str, dict[str, float]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                view = file.get_slice(key)
                module, kind = _split(key, path)
                if view.get_dtype() != "F32" or math.prod(view.get_shape()) != 1:
                    raise ScaleError(
                        f"{path}: {key} is {view.get_dtype()} {view.get_shape()}, expected one "
                        f"element of F32"
                    )
                found.setdefault(module, {})[kind] = float(file.get_tensor(key).reshape(()))
    except (SafetensorError, OSError) as error:
        raise CorruptSourceError(f"{path}: not readable as safetensors ({error})") from error
    return {module: ModuleScales(**scales) for module, scales in found.items()}


def _split(key: str, path: Path) -> tuple[str, str]:
    module, _, last = key.rpartition(".")
    kind = last.removesuffix("_scale")
    if not module or kind == last or kind not in KINDS:
        endings = ", ".join(f".{one}_scale" for one in KINDS)
        raise ScaleError(f"{path}: {key} ends in none of {endings}; remove it")
    return module, kind


_READERS: dict[str, Callable[[Path], dict[str, ModuleScales]]] = {
    ".json": _read_json,
    ".safetensors": _read_safetensors,
}
