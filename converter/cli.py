"""The command line: `fuseport convert | inspect | verify | demo`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from . import show
from .convert import convert_checkpoint, plan_checkpoint
from .demo import write_demo_checkpoint
from .errors import FuseportError, RecipeError
from .hf_family import make_family
from .recipe import FROM_SOURCE, MTP, PROFILES, SHARD_SIZE, USUAL_EXCLUDES, Recipe
from .report import Report
from .scales import read_scales
from .verify import verify_checkpoint

app = typer.Typer(
    name="fuseport",
    help="Turn checkpoints of Megatron or Hugging Face into what serving engines load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

# Exit codes: 1 for what the user can mend, 128 + its number for a signal (130: Ctrl-C).
FAILED, SIGNALLED = 1, 128
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Source = Annotated[Path, typer.Argument(help="A checkpoint of Megatron or Hugging Face.")]
Out = Annotated[Path, typer.Argument(help="The directory to create.")]
SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="YAML file of model facts that replace the source's.")
]
Facts = Annotated[
    list[str] | None,
    typer.Option("--fact", metavar="NAME=VALUE", help="One model fact; may be repeated."),
]

Quant = Annotated[str, typer.Option(help="none, fp8, fp8-row, fp8-block, mxfp8 or nvfp4.")]
Profile = Annotated[
    str, typer.Option(help="Who reads hf: vllm, sglang, trtllm or compressed-tensors.")
]
Mtp = Annotated[str, typer.Option(help="drop or keep layers that predict further tokens.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of modules not to quantise, beside lm_head; may be repeated."),
]
Scales = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Given scales: *.json or *.safetensors; or 'source': Transformer Engine's.",
    ),
]
KvCache = Annotated[
    str, typer.Option(help="none or fp8: keys and values in e4m3, with given scales or 1.0.")
]
KeepFirst = Annotated[int, typer.Option(help="First layers that are not quantised.")]
KeepLast = Annotated[int, typer.Option(help="Last layers that are not quantised.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="Sum the error of quantisation up in the same pass.")
]
Assets = Annotated[
    Path | None, typer.Option("--hf-assets", help="Copy the tokenizer's files from here.")
]
FamilyFile = Annotated[
    Path | None,
    typer.Option("--family", help="YAML table of an architecture in the Hugging Face layout."),
]


@app.command()
def convert(
    source: Source,
    out: Out,
    target: Annotated[str, typer.Option(help="trtllm (unified checkpoint) or hf.")] = "trtllm",
    tp: Annotated[int, typer.Option(help="Tensor parallel size of the target.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size of the target.")] = 1,
    ep: Annotated[int, typer.Option(help="Ranks that share out the experts; divides tp.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    quant: Quant = "none",
    exclude: Exclude = None,
    profile: Profile = PROFILES[0],
    mtp: Mtp = MTP[0],
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = 0,
    scales: Scales = None,
    kv_cache: KvCache = "none",
    vocab_size: Annotated[int | None, typer.Option(help="The tokenizer's, unpadded.")] = None,
    parallel_embedding: Annotated[bool, typer.Option(help="Shard the embeddings.")] = False,
    backend: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    spec: SpecFile = None,
    fact: Facts = None,
    family: FamilyFile = None,
    shard_size: Annotated[int, typer.Option(help="Most bytes of a file, for hf.")] = SHARD_SIZE,
    hf_assets: Assets = None,
    measure: Measure = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, print, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert a checkpoint. OUT appears whole or not at all."""
    facts = _facts(spec, fact) | ({} if vocab_size is None else {"vocab_size": vocab_size})
    recipe = Recipe(
        target=target, tp_size=tp, pp_size=pp, moe_ep_size=ep, dtype=dtype,
        use_parallel_embedding=parallel_embedding, shard_size=shard_size, family=_table(family),
        quant=quant, exclude=(*USUAL_EXCLUDES, *(exclude or ())), keep_first=keep_first,
        keep_last=keep_last, scales=_scales(scales), kv_cache=kv_cache, profile=profile, mtp=mtp,
    )  # fmt: skip
    plan = plan_checkpoint(source, recipe, facts)
    console.print(show.plan_table(plan), *show.notes(plan))
    if dry_run:
        return
    run = partial(convert_checkpoint, plan, out, backend=backend, device=device, measure=measure)
    _run(partial(run, overwrite=overwrite, assets=hf_assets), plan.nbytes)


def _run(run: Callable[..., Report], nbytes: int) -> None:
    with show.progress(console, "converting", nbytes) as advance:
        report = run(progress=advance)
    console.print(show.report_text(report))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A source checkpoint, or a converted one.")],
    spec: SpecFile = None,
    fact: Facts = None,
    family: FamilyFile = None,
) -> None:
    """Show the facts, tensors and sizes of a source or of a result."""
    for part in show.inspection(path, _facts(spec, fact), _table(family)):
        console.print(part)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    source: Annotated[
        Path | None, typer.Option(help="Derive every tensor again and compare bit for bit.")
    ] = None,
) -> None:
    """Check digests and structure, and with --source every bit."""
    with show.progress(console, "verifying", show.verify_bytes(out, source)) as advance:
        result = verify_checkpoint(out, source, progress=advance)
    console.print(show.verification_text(out, result))


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("out/demo"),
    tp: Annotated[int, typer.Option(help="Tensor parallel size of the target.")] = 2,
) -> None:
    """Write a small Megatron checkpoint, convert it, verify it, and show what happened."""
    source, out = directory / "megatron", directory / "trtllm"
    console.rule("a small Llama, as Megatron-Core saves it (torch_dist)")
    write_demo_checkpoint(source)
    inspect(source)
    console.rule(f"fuseport convert {source} {out} --tp {tp}")
    convert(source, out, tp=tp, overwrite=True)
    console.rule(f"fuseport inspect {out}")
    inspect(out)
    console.rule(f"fuseport verify {out} --source {source}")
    verify(out, source)


def _facts(file: Path | None, pairs: list[str] | None) -> dict[str, Any]:
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


def _scales(given: str | None) -> Mapping[str, Mapping[str, float]] | str | None:
    if given is None or given == FROM_SOURCE:
        return given
    return read_scales(Path(given)).entries


def _table(file: Path | None) -> dict[str, Any] | None:
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


class _Stopped(BaseException):
    """A signal that ends the program; not KeyboardInterrupt, which click handles by itself."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _frame: object) -> None:
    # What the first one sets going, a second one must not cut short.
    for one in STOPS:
        signal.signal(one, signal.SIG_IGN)
    raise _Stopped(number)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """One paragraph and an exit code instead of a traceback."""
    for one in STOPS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, _stop)
    try:
        yield
    except FuseportError as error:
        errors.print(f"[red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(FAILED)
    except _Stopped as stopped:
        errors.print(f"stopped by {signal.Signals(stopped.number).name}; nothing was kept")
        sys.exit(SIGNALLED + stopped.number)


def main() -> None:
    """Entry point of the `fuseport` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in ASCII gets a ? for ×, and no error.
            stream.reconfigure(errors="replace")
    with _readable_errors():
        app(standalone_mode=True)
