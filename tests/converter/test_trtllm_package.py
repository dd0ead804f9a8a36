"""A result and TensorRT-LLM's own code: what is called, with what, and what is said of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path

import pytest
from fuseport_testing import tensorrt_llm as stand_ins
from fuseport_testing.command import Run
from fuseport_testing.tiny import write_tiny

from fuseport.converter import doctor, trtllm_package


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("s") / "tiny")


@pytest.fixture(params=["trtllm", "hf"])
def result(request: pytest.FixtureRequest, run: Run, source: Path, tmp_path: Path) -> Path:
    """A converted checkpoint; its directory is called after its target."""
    out = tmp_path / str(request.param)
    size = ("--tp", 2) if request.param == "trtllm" else ()
    run("convert", source, out, "--target", request.param, *size)
    return out


class Installed:
    """Puts a stand-in in the package's place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.calls = patch, stand_ins.Calls()

    def put(self, version: str, target: str, *, broken: bool = False) -> stand_ins.Calls:
        for place in (trtllm_package, doctor):
            self.patch.setattr(place, "version", lambda name: version)
        modules = (
            stand_ins.unified(self.calls, ("lm_head.bias",) if broken else ())
            if target == "trtllm"
            else stand_ins.hugging_face(self.calls, broken=broken)
        )
        for name, module in modules.items():
            self.patch.setitem(sys.modules, name, module)
        return self.calls


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(monkeypatch)


VERSIONS = {"trtllm": "1.2.1", "hf": "1.3.0rc5"}


def test_absent(run: Run, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtllm_package, "version", lambda name: "")
    _, err = run("verify", result, "--with-tensorrt-llm", status=1)
    assert err.startswith(
        "MissingPackageError: --with-tensorrt-llm needs TensorRT-LLM, which is not"
    )
    assert "pip install 'fuseport[trtllm]'" in err
    answer = json.loads(run("verify", result, "--with-tensorrt-llm", "--json", status=1)[0])
    assert answer["error"] == "MissingPackageError"


def test_it_loads(run: Run, result: Path, installed: Installed) -> None:
    target = result.name
    calls = installed.put(VERSIONS[target], target)
    printed, _ = run("verify", result, "--with-tensorrt-llm")
    assert f"loaded by TensorRT-LLM {VERSIONS[target]}: " in printed
    names = [name for name, _ in calls]
    out = str(result)
    if target == "trtllm":
        assert names == [
            "PretrainedConfig.from_checkpoint",
            *["PretrainedModel.from_checkpoint"] * 2,
        ]
        assert [(given["ckpt_dir"], given["rank"]) for _, given in calls[1:]] == [
            (out, 0),
            (out, 1),
        ]
        # Each rank has a config of its own.
        assert [given["config"].mapping.rank for _, given in calls[1:]] == [0, 1]
    else:
        assert names == [
            "HfCheckpointLoader", "Mapping", "HfCheckpointLoader.load_config",
            "AutoModelForCausalLM.from_config", "to", "HfCheckpointLoader.load_weights",
            "HfCheckpointLoader.get_initialized_weight_mapper",
            "DecoderModelForCausalLM.load_weights", "HfCheckpointLoader.cleanup",
        ]  # fmt: skip
        assert calls[2][1] == {"checkpoint_dir": out, "kwargs": {"mapping": "mapping"}}
        assert calls[7][1]["weight_mapper"] == "mapper"
    answer = json.loads(run("verify", result, "--with-tensorrt-llm", "--json")[0])
    tensors = answer["tensors"]
    ranks = 2 if target == "trtllm" else 1
    expected = {"version": VERSIONS[target], "ranks": ranks, "parameters": tensors}
    assert answer["tensorrt_llm"] == expected


def test_it_does_not_load(run: Run, result: Path, installed: Installed) -> None:
    target = result.name
    calls = installed.put(VERSIONS[target], target, broken=True)
    _, err = run("verify", result, "--with-tensorrt-llm", status=1)
    assert err.startswith(
        f"VerificationError: TensorRT-LLM {VERSIONS[target]} cannot load {result}"
    )
    assert ("lm_head.bias" if target == "trtllm" else "model.norm.weight") in err
    if target == "hf":
        assert calls[-1][0] == "HfCheckpointLoader.cleanup"


def test_the_other_version(run: Run, result: Path, installed: Installed) -> None:
    target = result.name
    other = {"trtllm": "1.3.0", "hf": "1.2.1"}[target]
    calls = installed.put(other, target)
    _, err = run("verify", result, "--with-tensorrt-llm", status=1)
    assert err.startswith(f"MissingPackageError: TensorRT-LLM {other} is installed, but only")
    assert not calls


def test_a_package_that_cannot_be_imported(run: Run, result: Path, installed: Installed) -> None:
    target = result.name
    installed.put(VERSIONS[target], target)
    for name in ("tensorrt_llm.models", "tensorrt_llm.mapping"):
        installed.patch.setitem(sys.modules, name, None)
    _, err = run("verify", result, "--with-tensorrt-llm", status=1)
    assert err.startswith(f"MissingPackageError: TensorRT-LLM {VERSIONS[target]} is installed, but")


@pytest.mark.parametrize(
    ("version", "text"),
    [("", "not installed"), ("1.2.0", "1.2.0, reads --target trtllm"),
     ("1.3.0rc1", "1.3.0rc1, reads --target hf")],
)  # fmt: skip
def test_the_doctor_says_what_it_reads(version: str, text: str, installed: Installed) -> None:
    installed.put(version, "trtllm")
    assert doctor._tensorrt_llm().found == text


def test_the_recorded_signatures_are_the_package_s() -> None:
    """Where the package is installed: every parameter that is passed here is one of its own."""
    pytest.importorskip("tensorrt_llm")
    release = trtllm_package._release(importlib.metadata.version("tensorrt_llm"))
    is_unified = release <= trtllm_package.LAST_UNIFIED
    for path, name in stand_ins.SIGNATURES:
        if (path == stand_ins.UNIFIED) is not is_unified:
            continue
        found: object = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)
        theirs = inspect.signature(found).parameters
        ours = stand_ins.signature(path, name).parameters
        assert set(ours) <= set(theirs), name
