"""The command line: `fuseport convert | inspect | verify | demo`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import show
from .checkpoint_plan import CheckpointPlan, plan_checkpoint
from .convert import convert_checkpoint
from .demo import write_demo_checkpoint
from .errors import FuseportError
from .forecast import check_destination, forecast
from .group import Group, joined
from .limits import Limits, parse_size
from .option_files import read_facts, read_family, read_scale_option
from .recipe import MTP, PROFILES, SHARD_SIZE, USUAL_EXCLUDES, Recipe
from .timings import Timings
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
Reader = Annotated[
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
GpuMemory = Annotated[str, typer.Option(help="Most memory on the GPU: 1GiB, 800MB, bytes.")]
HostMemory = Annotated[str, typer.Option(help="Most private memory of the process.")]
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
    profile: Reader = PROFILES[0],
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    gpu_memory: GpuMemory = "1GiB",
    host_memory: HostMemory = "2GiB",
    check_source: Annotated[bool, typer.Option(help="Check the source's own checksums.")] = True,
    timings: Annotated[bool, typer.Option("--timings", help="Print each stage's times.")] = False,
) -> None:
    """Convert a checkpoint. OUT appears whole or not at all.

    Under torchrun the processes share the files out.
    """
    facts = read_facts(spec, fact) | ({} if vocab_size is None else {"vocab_size": vocab_size})
    recipe = Recipe(
        target=target, tp_size=tp, pp_size=pp, moe_ep_size=ep, dtype=dtype, profile=profile,
        use_parallel_embedding=parallel_embedding, shard_size=shard_size, quant=quant, mtp=mtp,
        exclude=(*USUAL_EXCLUDES, *(exclude or ())), keep_first=keep_first, keep_last=keep_last,
        family=read_family(family), scales=read_scale_option(scales), kv_cache=kv_cache,
    )  # fmt: skip
    options = Options(
        backend, device, overwrite, resume, hf_assets, measure, check_source,
        Limits(parse_size(gpu_memory), parse_size(host_memory)),
    )  # fmt: skip
    _carry_out(source, out, recipe, facts, options, dry_run=dry_run, timings=timings)


def _carry_out(
    source: Path, out: Path, recipe: Recipe, facts: Mapping[str, object], options: Options, *,
    dry_run: bool, timings: bool,
) -> None:  # fmt: skip
    """Plan, say so, and convert, alone or as one of several processes."""
    with joined() as group:
        printer = console if group.rank == 0 else Console(quiet=True)
        plan = plan_checkpoint(source, recipe, facts)
        printer.print(show.plan_table(plan), *show.notes(plan))
        if dry_run:
            check_destination(plan, out, overwrite=options.overwrite)
            known = forecast(plan, options.limits, options.device, group.size)
            printer.print(show.forecast_text(known))
            return
        times = _convert(plan, out, options, group, printer)
        if timings:
            printer.print(show.timings_table(times))


@dataclass(frozen=True)
class Options:
    """How a plan is carried out: `convert_checkpoint`'s arguments of these names."""

    backend: str
    device: str
    overwrite: bool
    resume: bool
    assets: Path | None
    measure: bool
    check_source: bool
    limits: Limits


def _convert(
    plan: CheckpointPlan, out: Path, options: Options, group: Group, printer: Console
) -> Timings:
    """Convert with a bar and a report; the busy times."""
    times = Timings()
    with show.progress(printer, "converting", plan.nbytes) as advance:
        report = convert_checkpoint(
            plan, out, timings=times, progress=advance, group=group, **vars(options)
        )
    printer.print(show.report_text(report))
    return times


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A source checkpoint, or a converted one.")],
    spec: SpecFile = None,
    fact: Facts = None,
    family: FamilyFile = None,
) -> None:
    """Show the facts, tensors and sizes of a source or of a result."""
    for part in show.inspection(path, read_facts(spec, fact), read_family(family)):
        console.print(part)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    source: Annotated[
        Path | None, typer.Option(help="Derive every tensor again and compare bit for bit.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a report as JSON.")] = False,
    host_memory: HostMemory = "2GiB",
) -> None:
    """Check digests and structure, and with --source every bit."""
    printer = Console(quiet=True) if json else console
    limits = Limits(host_memory=parse_size(host_memory))
    try:
        with show.progress(printer, "verifying", show.verify_bytes(out, source)) as advance:
            result = verify_checkpoint(out, source, limits=limits, progress=advance)
    except FuseportError as error:
        if json:
            print(show.json_report(out, error))
        raise
    if json:
        print(show.json_report(out, result))
    else:
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
        errors.print(f"stopped by {signal.Signals(stopped.number).name}; OUT is as it was")
        sys.exit(SIGNALLED + stopped.number)


def main() -> None:
    """Entry point of the `fuseport` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in ASCII gets a ? for ×, and no error.
            stream.reconfigure(errors="replace")
    with _readable_errors():
        app(standalone_mode=True)
