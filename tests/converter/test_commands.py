"""JSON for programs, more and less for people, bars, colours, completion, and the doctor."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseport_testing.command import Run
from fuseport_testing.tiny import write_tiny
from rich.console import Console
from rich.table import Table

from fuseport.converter import bars, cli, doctor, show
from fuseport.converter.backend import default_device
from fuseport.converter.checkpoint_plan import plan_checkpoint
from fuseport.converter.commands.conversion import own_bytes
from fuseport.converter.commands.output import output
from fuseport.converter.errors import OutputError
from fuseport.converter.group import Alone
from fuseport.converter.recipe import Recipe
from fuseport.converter.sources.source import make_source
from fuseport.converter.sources.stored import Stored
from fuseport.converter.tables import names, titled

DOCS = Path(__file__).parents[2] / "docs" / "command-line.md"
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("s") / "tiny")


def documented(*titles: str) -> set[str]:
    """The keys that docs/command-line.md lists under some titles, and those of every answer."""
    sections = re.split(r"^### ", DOCS.read_text(), flags=re.MULTILINE)
    by_title = {text.splitlines()[0]: text for text in sections}
    chosen = [by_title[title] for title in ("Every answer", *titles)]
    return {key for text in chosen for key in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}


def answer(run: Run, *args: object, status: int = 0) -> dict[str, Any]:
    """The JSON that a command prints, and that it prints nothing else."""
    values: dict[str, Any] = json.loads(run(*args, "--json", status=status)[0])
    assert values["command"] == args[0]
    assert values["ok"] is (status == 0)
    return values


def test_inspect_answers(run: Run, source: Path, tmp_path: Path) -> None:
    found = answer(run, "inspect", source)
    assert found.keys() == documented("`inspect` of a source")
    tensor = next(one for one in found["tensors"] if one["name"] == "output_layer.weight")
    assert tensor == {
        "name": "output_layer.weight", "shape": [32, 16], "dtype": "float32", "bytes": 2048,
    }  # fmt: skip
    assert found["facts"]["num_query_groups"] == 2
    run("convert", source, tmp_path / "out", "--tp", 2)
    found = answer(run, "inspect", tmp_path / "out")
    assert found.keys() == documented("`inspect` of a result")
    assert found["recipe"]["tp_size"] == 2
    assert found["settings"]["architecture"] == "LlamaForCausalLM"
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    del sizes["fuseport-manifest.json"]
    assert {one["name"]: one["bytes"] for one in found["files"]} == sizes


def test_convert_answers(run: Run, source: Path, tmp_path: Path) -> None:
    dry = answer(run, "convert", source, tmp_path / "out", "--tp", 2, "--dry-run")
    assert dry.keys() == documented("`convert --dry-run`")
    assert not (tmp_path / "out").exists()
    assert dry["recipe"].keys() == {one.name for one in dataclasses.fields(Recipe)}
    done = answer(run, "convert", source, tmp_path / "out", "--tp", 2)
    assert done.keys() == documented("`convert --dry-run`", "`convert`") - {"forecast"}
    assert done["files"] == dry["files"]
    for one in done["files"]:
        assert (tmp_path / "out" / one["name"]).stat().st_size == one["bytes"]
    assert done["stages"]["write"]["bytes"] > 0


def test_verify_answers(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("convert", source, out)
    assert answer(run, "verify", out)["accounting"] is None
    found = answer(run, "verify", out, "--source", source)
    assert found.keys() == documented("`verify`")
    assert found["accounting"]["dropped"] == {
        "embedding.word_embeddings.weight": 32, "output_layer.weight": 32,
    }  # fmt: skip
    (out / "config.json").unlink()
    wrong = answer(run, "verify", out, status=1)
    assert wrong.keys() == documented("After an error")
    assert wrong["error"] == "VerificationError"


def test_one_of_several_processes_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, expected in (("1", ""), ("0", "verify")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(OutputError), output("verify", json=True):
            raise OutputError("full")
        found = capsys.readouterr().out
        assert (json.loads(found)["command"] if found else "") == expected


def test_quiet_and_verbose(run: Run, source: Path, tmp_path: Path) -> None:
    plain, _ = run("convert", source, tmp_path / "a")
    assert "hidden_size" not in plain
    assert "busy times" not in plain
    commands = ("convert", source, tmp_path / "b"), ("inspect", source), ("verify", tmp_path / "a")
    for command in commands:
        assert run(*command, "--quiet") == ("", "")
    loud, _ = run("convert", source, tmp_path / "c", "--verbose")
    for word in ("hidden_size", "busy times", f"on {default_device('auto')}; windows"):
        assert word in loud
    _, err = run("inspect", source, "-q", "-v", status=2)
    assert "cannot be had together" in " ".join(err.split())


def test_warnings_are_for_everybody(run: Run, source: Path, tmp_path: Path) -> None:
    for number, option in enumerate(("--quiet", "--json", "--verbose")):
        out = tmp_path / str(number)
        _, err = run("convert", source, out, "--kv-cache", "fp8", option)
        assert err.startswith("warning: ")
        assert err.count("\n") == 1


def test_colours_obey_no_color(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run("convert", source, tmp_path / "out")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["fuseport", "verify", str(tmp_path / "out")])
    for expected in (True, False):
        with pytest.raises(SystemExit):
            cli.main()
        assert bool(COLOUR.search(capsys.readouterr().out)) is expected
        monkeypatch.setenv("NO_COLOR", "1")


def test_a_log_file_gets_a_line_now_and_then() -> None:
    now, log = [0.0], io.StringIO()
    lines = bars.Lines(Console(file=log), "reading", 4000, lambda: now[0])
    for _ in range(40):
        now[0] += 1
        lines.advance(100)
    lines.end()
    assert log.getvalue() == (
        "reading: 1.5 kB of 4.0 kB (37%), 100 B/s\n"
        "reading: 3.0 kB of 4.0 kB (75%), 100 B/s\n"
        "reading: 4.0 kB in 40.0 s, 100 B/s\n"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    # Whoever is done is at the end, also with less to do than was expected.
    with bars.progress(Console(file=file, force_terminal=terminal), "reading", 9) as advance:
        advance(5)
    assert ("\x1b[" in file.getvalue()) is terminal
    assert (COLOUR.sub("", file.getvalue()).count("5/5 bytes") == 1) is terminal
    assert ("reading: 5 B in 0.0 s" in file.getvalue()) is not terminal


def test_processes_count_what_they_do(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(source, Recipe(tp_size=2, quant="fp8-row"))
    whole = own_bytes(plan, Alone())
    assert whole == sum(one.nbytes for one in plan.tensors)
    monkeypatch.setattr(Alone, "size", 2)
    assert own_bytes(plan, Alone()) == whole // 2


def test_tables_cut_no_name_and_no_title() -> None:
    table = Table(names("tensor"), "shape")
    for name in ("layers.linear_qkv.weight", "layers.linear_qkv.layer_norm_weight"):
        table.add_row(name, "4096 × 4096")
    printed = io.StringIO()
    Console(file=printed, width=32).print(titled("a title of more columns", table))
    title, *rows = printed.getvalue().splitlines()
    assert title == "a title of more columns"
    cells = [row.split("│")[1].strip() for row in rows if row.startswith("│")]
    assert "".join(cells) == "layers.linear_qkv.weightlayers.linear_qkv.layer_norm_weight"


SHAPES = {
    "decoder.layers.0.mlp.linear_fc1.weight": (4, 2),
    "decoder.layers.10.mlp.linear_fc1.weight": (4, 2),
    "decoder.layers.2.mlp.linear_fc1.weight": (6, 2),
    "decoder.layers.1.mlp.experts.linear_fc1.weight0": (4, 2),
    "decoder.layers.1.mlp.experts.linear_fc1.weight1": (4, 2),
    "output_layer.weight": (4, 2),
}


def shown(every: bool) -> list[list[str]]:
    """The rows of a source of `SHAPES`: names, shapes, tensors, and sizes."""
    stored = {name: Stored(name, shape, torch.bfloat16, ()) for name, shape in SHAPES.items()}
    source = make_source(Path("x"), "mp_rank", stored, {}, {})
    printed = io.StringIO()
    Console(file=printed, width=120).print(show.source_table(source, every=every))
    rows = [line.split("│")[1:-1] for line in printed.getvalue().splitlines() if line[0] == "│"]
    return [[cell.strip() for cell in row] for row in rows]


def test_layers_and_experts_share_a_row() -> None:
    assert shown(every=False) == [
        ["decoder.layers.*.mlp.linear_fc1.weight", "4 × 2", "bfloat16", "2", "32 B"],
        ["decoder.layers.*.mlp.experts.linear_fc1.weight*", "4 × 2", "bfloat16", "2", "32 B"],
        ["decoder.layers.2.mlp.linear_fc1.weight", "6 × 2", "bfloat16", "1", "24 B"],
        ["output_layer.weight", "4 × 2", "bfloat16", "1", "16 B"],
    ]


def test_verbose_shows_every_tensor() -> None:
    assert [row[0] for row in shown(every=True)] == sorted(SHAPES)


def test_a_failure_is_not_a_hundred_percent() -> None:
    file = io.StringIO()
    with (
        pytest.raises(OutputError),
        bars.progress(Console(file=file, force_terminal=False), "reading", 9),
    ):
        raise OutputError("full")
    assert not file.getvalue()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fuseport in", ["inspect"]),
        ("fuseport convert --quant fp8-", ["fp8-row", "fp8-block"]),
        ("fuseport convert --profile v", ["vllm"]),
        ("fuseport verify --so", ["--source"]),
    ],
)
def test_completion(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["fuseport"])
    monkeypatch.setenv("_FUSEPORT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == offered


def test_help_and_completion_do_without_torch() -> None:
    code = "import sys; from fuseport.converter import cli; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found == "False\n"


def test_doctor(run: Run, tmp_path: Path) -> None:
    found = answer(run, "doctor", tmp_path / "not" / "there")
    assert found.keys() == documented("`doctor`")
    by_topic = {one["topic"]: one for one in found["findings"]}
    assert by_topic["conversion"]["state"] == "ok"
    assert "bit for bit" in by_topic["conversion"]["found"]
    assert str(tmp_path) in by_topic["space"]["found"]
    assert by_topic["Python"]["found"].startswith(sys.version.split()[0])
    assert "transformers 5" in by_topic["extra hf"]["found"]
    assert not list(tmp_path.iterdir())
    printed = io.StringIO()
    table = show.findings_table([doctor.Finding(**one) for one in found["findings"]])
    Console(file=printed, width=80).print(table)
    assert re.search(r"│ ok +│ conversion ", printed.getvalue())


def test_doctor_says_when_nothing_can_be_converted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "convert_checkpoint", broken)
    found = answer(run, "doctor", tmp_path, status=1)
    failed = [one for one in found["findings"] if one["state"] == "fails"]
    assert [one["topic"] for one in failed] == ["conversion"]
    assert "no kernel image" in failed[0]["found"]
    assert not list(tmp_path.iterdir())


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:  64 kB\n")
    assert doctor.free_memory(tmp_path) == 64 << 10
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 64 << 10), ("5000", 4000), ("9000000", 64 << 10)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert doctor.free_memory(tmp_path) == expected
