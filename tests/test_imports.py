"""Imports run one way: torch, triton <- kernels <- converter <- benchmarks, tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each folder may import of the project itself.
ALLOWED = {
    "kernels": {"kernels"},
    "converter": {"kernels", "converter"},
    "benchmarks": {"kernels", "converter", "benchmarks"},
    "examples": {"kernels", "converter"},
    "tests": {"kernels", "converter", "benchmarks", "tests"},
}
# The kernels are written in triton; the benchmarks compile them ahead of time.
USES_TRITON = {"kernels", "benchmarks"}
# What spares Triton's interpreter some work, and its test.
INTERPRETER = {
    Path("tests/support/fuseport_testing/interpreter.py"),
    Path("tests/support/test_interpreter.py"),
}
FILES = sorted(
    path.relative_to(ROOT) for folder in ALLOWED for path in ROOT.glob(f"{folder}/**/*.py")
)


def absolute(node: ast.ImportFrom, file: Path) -> str:
    """The module that `from ... import` names, seen from the repository's root."""
    if node.level == 0:
        return node.module or ""
    package = file.parts[: len(file.parts) - node.level]
    return ".".join((*package, *filter(None, [node.module])))


def names(node: ast.AST, file: Path) -> Iterator[str]:
    """The dotted names that one statement may import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = absolute(node, file)
        yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def imports(source: str, file: Path) -> set[str]:
    """Every import of `source`, lazy ones too, `fuseport.` being the repository's root."""
    found = {name for node in ast.walk(ast.parse(source)) for name in names(node, file)}
    return {name.removeprefix("fuseport.") for name in found}


def faults(source: str, file: Path) -> list[str]:
    """The imports of `source` that its place forbids."""
    folder = file.parts[0]
    bad = []
    for name in sorted(imports(source, file)):
        top = name.partition(".")[0]
        if top in ALLOWED.keys() - ALLOWED[folder] or (
            top == "triton" and folder not in USES_TRITON and file not in INTERPRETER
        ):
            bad.append(f"{file} imports {name}")
        if file in REFERENCES and not allowed_in_reference(name):
            bad.append(f"{file} imports {name}")
        if file.parent == SUPPORT and file.stem not in DRIVERS and uses_fuseport(name):
            bad.append(f"{file} imports {name}")
    return bad


REFERENCES = {Path("kernels/reference.py"), Path("kernels/quant_reference.py")}


def allowed_in_reference(name: str) -> bool:
    """The reference is an independent second opinion: it may know what a move is, and itself."""
    top, _, rest = name.partition(".")
    known = {"move", "quant", "quant_reference"}
    return top not in {"triton", "kernels"} or rest.partition(".")[0] in known


SUPPORT = Path("tests/support/fuseport_testing")
# What runs fuseport, or fills its moves. All else there judges it, or makes what it is given.
DRIVERS = {
    "amax_worker", "coverage_fuzz", "dropin", "dropin_worker", "faulty", "matrices", "pages",
    "refit_worker", "report_image",
}  # fmt: skip


def uses_fuseport(name: str) -> bool:
    """By itself, or through an asset that does."""
    parts = name.split(".")
    return parts[0] in {"kernels", "converter"} or not DRIVERS.isdisjoint(parts)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file: Path) -> None:
    assert faults((ROOT / file).read_text(), file) == []


def test_the_folders_were_found() -> None:
    assert {file.parts[0] for file in FILES} >= {"kernels", "converter", "tests"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/move.py", "from ..converter.errors import ModelError"),
        ("kernels/move.py", "from fuseport.converter import errors"),
        ("kernels/move.py", "import fuseport.converter.errors"),
        ("kernels/move.py", "from .. import converter"),
        ("converter/plan.py", "def f():\n    import triton"),
        ("converter/targets/hf.py", "from triton import language"),
        ("converter/plan.py", "from benchmarks.aot import compile_kernel"),
        ("converter/targets/hf.py", "from ...tests import support"),
        ("kernels/reference.py", "from .numerics import LIMITS"),
        ("kernels/reference.py", "from . import amax"),
        ("kernels/reference.py", "import triton.language as tl"),
        ("tests/kernels/test_move.py", "import triton"),
        ("tests/support/fuseport_testing/oracle.py", "from fuseport.kernels import codecs"),
        ("tests/support/fuseport_testing/oracle.py", "from .dropin import shards"),
        ("tests/support/fuseport_testing/oracle.py", "from fuseport_testing import matrices"),
    ],
)
def test_a_backward_import_is_found(file: str, source: str) -> None:
    assert len(faults(source, Path(file))) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/fused_copy.py", "import triton\nfrom .move import Move"),
        ("kernels/reference.py", "import torch\nfrom .move import Move"),
        (
            "converter/targets/hf.py",
            "from ...kernels.move import Move\nfrom ..errors import ModelError",
        ),
        ("tests/kernels/test_move.py", "from fuseport.kernels.move import Move"),
        ("benchmarks/aot.py", "import triton\nfrom fuseport.kernels import move"),
        ("tests/support/fuseport_testing/oracle.py", "from .cases import Case"),
        ("tests/support/fuseport_testing/dropin.py", "from fuseport.converter import megatron"),
    ],
)
def test_a_forward_import_passes(file: str, source: str) -> None:
    assert faults(source, Path(file)) == []
