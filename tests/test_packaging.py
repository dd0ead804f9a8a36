"""The installed names are fuseport.kernels and fuseport.converter, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "converter")
# Files of the packages as the repository has them, by their installed names.
EXPECTED = sorted(
    f"fuseport/{path.relative_to(ROOT)}"
    for folder in FOLDERS
    for path in ROOT.glob(f"{folder}/**/*")
    if path.suffix in (".py", ".yaml") or path.name == "py.typed"
)


def run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a clean environment; `path` is its whole PYTHONPATH."""
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def python(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` without site-packages (-S): only `cwd` and `path` can be imported from."""
    return run(sys.executable, "-S", "-c", code, cwd=cwd, path=path)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of the sources."""
    base = tmp_path_factory.mktemp("packaging")
    source = base / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    code = f"from setuptools import build_meta as b; b.build_sdist({str(base / 'dist')!r})"
    (base / "dist").mkdir()
    result = run(sys.executable, "-c", code, cwd=source)
    assert result.returncode == 0, result.stderr
    (found,) = (base / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def target(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from the source distribution, without the network."""
    installed = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-compile")
    pip = (sys.executable, "-m", "pip", "install", *options)
    result = run(*pip, "--target", str(installed), str(sdist), cwd=installed)
    assert result.returncode == 0, result.stderr
    return installed


def test_the_version_has_release_notes(sdist: Path) -> None:
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert sdist.name == f"fuseport-{newest[1]}.tar.gz"


def test_every_source_file_is_installed(target: Path) -> None:
    files = (path for path in target.glob("fuseport/**/*") if path.is_file())
    assert sorted(str(path.relative_to(target)) for path in files) == EXPECTED


def test_the_type_markers_are_installed(target: Path) -> None:
    assert all((target / "fuseport" / folder / "py.typed").is_file() for folder in FOLDERS)


def test_no_other_top_level_name(sdist: Path, target: Path) -> None:
    names = {path.name for path in target.iterdir()}
    assert names - {"bin"} == {"fuseport", sdist.name.replace(".tar.gz", ".dist-info")}


def test_fuseport_and_kernels_are_namespace_packages(target: Path) -> None:
    assert not (target / "fuseport" / "__init__.py").exists()
    assert not (target / "fuseport" / "kernels" / "__init__.py").exists()


def test_kernels_is_importable_under_fuseport_only(target: Path, tmp_path: Path) -> None:
    inside = python("import fuseport.kernels", cwd=tmp_path, path=target)
    assert inside.returncode == 0, inside.stderr
    outside = python("import kernels", cwd=tmp_path, path=target)
    assert "No module named 'kernels'" in outside.stderr


def test_the_folder_does_not_shadow_a_package_named_kernels(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    result = python("import kernels; print(kernels.__file__)", cwd=ROOT, path=tmp_path)
    assert result.stdout.strip() == str(package / "__init__.py"), result.stderr
