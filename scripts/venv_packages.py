"""What scripts/setup asks about packages; runs on a bare interpreter.

pins            print the torch and triton versions of this interpreter, if both satisfy
                pyproject.toml; else fail
inherit VENV    let VENV import this interpreter's packages
missing [EXTRA] print what fuseport and its EXTRA require and this interpreter lacks
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

# The oldest versions that can be inherited; pyproject.toml asks for the same.
OLDEST = {"torch": (2, 11), "triton": (3, 6)}


def main(arguments: list[str]) -> None:
    """Run one of the commands above."""
    command, *rest = arguments
    if command == "pins":
        lines = pins()
    elif command == "inherit":
        lines = inherit(Path(rest[0]))
    else:
        lines = missing(rest[0] if rest else "")
    print(*lines, sep="\n", end="\n" if lines else "")


def pins() -> list[str]:
    """Return pip constraints that keep torch and triton as they are."""
    return [f"{name}=={_usable_version(name, oldest)}" for name, oldest in OLDEST.items()]


def _usable_version(name: str, oldest: tuple[int, ...]) -> str:
    import_module(name)
    version = metadata.version(name)
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        sys.exit(f"{name} {version} is too old")
    return version


def inherit(venv: Path) -> list[str]:
    """Write this interpreter's package folders into a .pth file of `venv`.

    `--system-site-packages` is not enough: when this interpreter is itself in a virtual
    environment, that option would lead past it to the interpreter below.
    """
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    dynamic = {f"{path}/lib-dynload" for path in standard}
    folders = [path for path in sys.path[1:] if Path(path).is_dir()]
    kept = [path for path in folders if path not in standard | dynamic]
    (target,) = venv.glob("lib/python3*/site-packages")
    (target / "inherited.pth").write_text("\n".join(kept) + "\n")
    return []


def missing(extra: str) -> list[str]:
    """Return the requirements of fuseport[`extra`] that are absent or of another version."""
    return sorted(set(_missing(extra)))


def _missing(extra: str) -> Iterator[str]:
    from pip._vendor.packaging.requirements import Requirement

    for line in metadata.requires("fuseport") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        need.marker = None
        if need.name == "fuseport":
            for nested in need.extras:
                yield from _missing(nested)
            continue
        version = _installed_version(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            yield str(need)


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
