"""`fuseport convert`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..choices import (
    BACKENDS,
    CACHES,
    DEVICES,
    DTYPE_NAMES,
    MTP,
    PROFILES,
    QUANTS,
    SHARD_SIZE,
    TARGETS,
    USUAL_EXCLUDES,
)
from .options import Facts, FamilyFile, HostMemory, Json, Quiet, SpecFile, Verbose, listed, words
from .output import output

Source = Annotated[Path, typer.Argument(help="A checkpoint of Megatron or Hugging Face.")]
Out = Annotated[Path, typer.Argument(help="The directory to create.")]
TargetName = Annotated[
    str, typer.Option(help="trtllm (unified checkpoint) or hf.", autocompletion=words(TARGETS))
]
Dtype = Annotated[
    str, typer.Option(help=f"{listed(DTYPE_NAMES)}.", autocompletion=words(DTYPE_NAMES))
]
Backend = Annotated[str, typer.Option(help=f"{listed(BACKENDS)}.", autocompletion=words(BACKENDS))]
Device = Annotated[str, typer.Option(help=f"{listed(DEVICES)}.", autocompletion=words(DEVICES))]
Quant = Annotated[str, typer.Option(help=f"{listed(QUANTS)}.", autocompletion=words(QUANTS))]
Reader = Annotated[
    str,
    typer.Option(help=f"Who reads hf: {listed(PROFILES)}.", autocompletion=words(PROFILES)),
]
Mtp = Annotated[
    str,
    typer.Option(
        help="drop or keep layers that predict further tokens.", autocompletion=words(MTP)
    ),
]
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
    str,
    typer.Option(
        help="none or fp8: keys and values in e4m3, with given scales or 1.0.",
        autocompletion=words(CACHES),
    ),
]
KeepFirst = Annotated[int, typer.Option(help="First layers that are not quantised.")]
KeepLast = Annotated[int, typer.Option(help="Last layers that are not quantised.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="Sum the error of quantisation up in the same pass.")
]
Assets = Annotated[
    Path | None, typer.Option("--hf-assets", help="Copy the tokenizer's files from here.")
]
ReportDir = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="DIR", help="Write a page about the conversion; implies --measure."
    ),
]
GpuMemory = Annotated[str, typer.Option(help="Most memory on the GPU: 1GiB, 800MB, bytes.")]


def convert(
    source: Source,
    out: Out,
    target: TargetName = TARGETS[0],
    tp: Annotated[int, typer.Option(help="Tensor parallel size of the target.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size of the target.")] = 1,
    ep: Annotated[int, typer.Option(help="Ranks that share out the experts; divides tp.")] = 1,
    dtype: Dtype = DTYPE_NAMES[0],
    quant: Quant = QUANTS[0],
    exclude: Exclude = None,
    profile: Reader = PROFILES[0],
    mtp: Mtp = MTP[0],
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = 0,
    scales: Scales = None,
    kv_cache: KvCache = CACHES[0],
    vocab_size: Annotated[int | None, typer.Option(help="The tokenizer's, unpadded.")] = None,
    parallel_embedding: Annotated[bool, typer.Option(help="Shard the embeddings.")] = False,
    backend: Backend = BACKENDS[0],
    device: Device = DEVICES[0],
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
    report: ReportDir = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint. OUT appears whole or not at all.

    Under torchrun the processes share the files out.
    """
    with output("convert", json=json, quiet=quiet, verbose=verbose) as printer:
        from ..limits import Limits, parse_size
        from ..option_files import read_facts, read_family, read_scale_option
        from ..recipe import Recipe
        from .conversion import Options, Wanted, carry_out

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
        wanted = Wanted(dry_run, timings, report)
        carry_out(source, out, recipe, facts, options, wanted, printer)
