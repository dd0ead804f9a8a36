"""The command line: what it prints, how it exits, and what a signal leaves behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from fuseport_testing.command import MAIN, Run, run_process
from fuseport_testing.forked import Process
from fuseport_testing.tiny import ITERATION, SPEC, tiny_weights, write_tiny

from fuseport.converter.limits import parse_size
from fuseport.converter.timings import STAGES

# The command stops for a while at the first tensor, and says so. In short sleeps: a signal
# that the system hands to another thread does not wake this one, which is what acts on it.
SLOW = """
import signal, sys, time
# A test run in the background ignores some, and its children would too.
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(one, signal.default_int_handler)
from pathlib import Path
from fuseport.converter.writer import Writer
def write(self, *args):
    Path(self.directory).parent.joinpath("begun").touch()
    for _ in range(600):
        time.sleep(0.1)
Writer.put = write
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("s") / "tiny")


def test_demo_shows_the_whole_way(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = run_process("demo")
    assert not err
    for word in ("num_query_groups", "LlamaForCausalLM", "verified out/demo/trtllm", "bit for bit"):
        assert word in out
    assert sorted(os.listdir("out/demo")) == ["megatron", "trtllm"]
    # A second time it replaces what it made.
    run("demo", "out/demo", "--tp", 4)
    assert len(list(Path("out/demo/trtllm").glob("rank*"))) == 4


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (f"fuseport {importlib.metadata.version('fuseport')}\n", "")


def test_convert_inspect_verify(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed, _ = run("convert", source, out, "--tp", 2, "--pp", 2, "--dtype", "float16")
    assert "tp 2 × pp 2" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "fuseport-manifest.json",
        *(f"rank{rank}.safetensors" for rank in range(4)),
    ]
    printed, _ = run("inspect", out)
    assert '"float16"' in printed
    printed, _ = run("inspect", source)
    assert "hidden_size" in printed
    assert "32 × 16" in printed
    assert "digests and structure" in run("verify", out)[0]
    assert "bit for bit" in run("verify", out, "--source", source)[0]


def test_dry_run_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    printed, _ = run("convert", source, tmp_path / "out", "--tp", 4, "--dry-run")
    assert "rank3.safetensors" in printed
    assert not list(tmp_path.iterdir())
    _, err = run("convert", source, tmp_path / "out", "--tp", 3, "--dry-run", status=1)
    assert err.startswith("RecipeError: num_attention_heads = 4 cannot be split evenly")


def test_dry_run_says_what_it_would_take(run: Run, source: Path, tmp_path: Path) -> None:
    printed, _ = run("convert", source, tmp_path / "out", "--dry-run", "--host-memory", "1GiB")
    words = " ".join(printed.split())
    assert re.search(r"reads [\d.]+ kB, writes [\d.]+ kB; at most 1.1 GB of the host's", words)
    assert "about 0 min" in words
    (tmp_path / "file").touch()
    for out, match in (
        (tmp_path / "file", "is a file"),
        (source / ITERATION / "out", "among the source"),
    ):
        _, err = run("convert", source, out, "--dry-run", status=1)
        assert err.startswith("OutputError:")
        assert match in err


def test_timings_and_report(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed, _ = run("convert", source, "out", "--timings")
    assert all(name in printed for name in STAGES)
    report = json.loads(run("verify", "out", "--source", source, "--json")[0])
    assert report["ok"] is True
    assert report["accounting"]["dropped"]
    (tmp_path / "out" / "config.json").unlink()
    out, err = run("verify", "out", "--json", status=1)
    assert json.loads(out)["error"] == "VerificationError"
    assert "config.json is missing" in err


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("3kib", 3072)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1 XB", "GiB"])
def test_sizes_that_are_none(text: str, run: Run, source: Path, tmp_path: Path) -> None:
    _, err = run("convert", source, tmp_path / "out", f"--host-memory={text}", status=1)
    assert err.startswith("RecipeError: a size is")


def test_overwrite(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("convert", source, out)
    _, err = run("convert", source, out, status=1)
    assert err.startswith("OutputError:")
    assert "--overwrite" in err
    run("convert", source, out, "--tp", 2, "--overwrite")
    assert len(list(out.glob("rank*"))) == 2
    (tmp_path / "mine").mkdir()
    _, err = run("convert", source, tmp_path / "mine", "--overwrite", status=1)
    assert "not just a converted checkpoint" in err
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_facts_from_a_file_and_from_the_line(run: Run, tmp_path: Path) -> None:
    source, spec = write_tiny(tmp_path / "s", facts=None), tmp_path / "facts.yaml"
    spec.write_text("".join(f"{name}: {value}\n" for name, value in SPEC.items()))
    _, err = run("convert", source, tmp_path / "out", status=1)
    assert "found nothing; give it as the fact num_attention_heads (--fact " in err
    # The line comes after the file.
    facts = ("--fact", "vocab_size=29", "--fact", "layernorm_epsilon=1e-6")
    run("convert", source, tmp_path / "out", "--spec", spec, *facts)
    settings = (tmp_path / "out" / "config.json").read_text()
    assert '"vocab_size": 29' in settings
    assert '"norm_epsilon": 1e-06' in settings
    run("convert", source, tmp_path / "two", "--spec", spec, *facts, "--vocab-size", 28)
    assert '"vocab_size": 28' in (tmp_path / "two" / "config.json").read_text()
    assert "layernorm_epsilon" in run("inspect", source, "--spec", spec)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fact", "layernorm_eps=1"), "did you mean layernorm_epsilon"),
        (("--fact", "num_layers"), "expected NAME=VALUE"),
        (("--fact", "num_layers="), "expected NAME=VALUE"),
        (("--fact", "=1"), "expected NAME=VALUE"),
        (("--fact", "num_layers={"), "cannot be read as YAML"),
        (("--fact", "num_layers=!!timestamp x"), "cannot be read as YAML"),
        (("--spec", "none.yaml"), "none.yaml cannot be read"),
        (("--vocab-size", 0), "vocab_size must be a whole number from 1"),
        (("--vocab-size", 99), "the embedding has 32 rows"),
        (("--tp", 0), "tp_size must be a whole number of at least 1"),
        (("--dtype", "fp8"), "dtype 'fp8' is none of"),
        (("--target", "onnx"), "target 'onnx' is none of"),
        (("--backend", "cpp"), "backend 'cpp' is none of"),
        (("--device", "tpu"), "device 'tpu' is none of"),
    ],
)
def test_options_that_cannot_work(
    run: Run, options: tuple[object, ...], message: str, source: Path, tmp_path: Path
) -> None:
    _, err = run("convert", source, tmp_path / "out", *options, status=1)
    assert message in err
    # One paragraph, however wide the terminal is.
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[1", "3", "1: 2", "", "nonsense: 3"])
def test_a_spec_that_makes_no_sense(run: Run, text: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "spec").write_text(text)
    _, err = run("convert", source, tmp_path / "out", "--spec", tmp_path / "spec", status=1)
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["spec"]


def test_usage_errors_and_wrong_paths(run: Run, source: Path, tmp_path: Path) -> None:
    assert "Missing argument" in run("convert", status=2)[1]
    assert "No such option" in run("convert", source, tmp_path / "out", "--what", status=2)[1]
    for args in (("inspect", tmp_path / "no"), ("convert", tmp_path / "no", tmp_path / "out")):
        assert run(*args, status=1)[1].startswith("SourceError:")
    assert run("verify", source, status=1)[1].startswith("VerificationError:")


def test_overflow_is_warned_about(run: Run, tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["output_layer.weight"][3, 5] = 1e6
    source = write_tiny(tmp_path / "s", weights)
    _, err = run("convert", source, tmp_path / "out", "--dtype", "float16")
    assert err.startswith("warning: 1 values in 1 tensors exceed their format")


def test_names_with_brackets_and_a_log_in_ascii(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o[/red]"
    run_process("convert", source, out, PYTHONIOENCODING="ascii")
    assert "o[/red]" in "".join(run("inspect", out)[0].split())
    assert "o[/red]" in "".join(run("verify", out)[0].split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    program = tmp_path / "program" / "slow.py"
    program.parent.mkdir()
    program.write_text(SLOW + MAIN)
    place = tmp_path / "place"
    place.mkdir()
    command = (str(program), "convert", str(source), str(place / "out"))
    process = Process(*command, environment=dict(os.environ))
    until = time.monotonic() + 60
    while not (place / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    done = process.end(60)
    assert done.returncode == 128 + number
    assert "Traceback" not in done.stderr
    assert f"stopped by {number.name}; OUT is as it was" in done.stderr
    assert os.listdir(place) == ["begun"]
