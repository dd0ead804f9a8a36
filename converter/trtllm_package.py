"""A result, loaded by an installed TensorRT-LLM itself: does the engine's own code take it?

Up to 1.2 the package reads unified checkpoints: a config, and a model of each rank. From 1.3 on it
reads the Hugging Face layout: a config loader, a model, and a weight mapper. What is called here,
and with which arguments, is held by tests against signatures of the public sources
(`tests/support/fuseport_testing/tensorrt_llm.py` says of which commits).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import MissingPackageError, VerificationError
from .installed import version

PACKAGE = "tensorrt_llm"
# The last release that reads unified checkpoints, and the first that reads Hugging Face's layout.
LAST_UNIFIED, FIRST_HF = (1, 2), (1, 3)

Release = tuple[int, int]


@dataclass(frozen=True)
class Loaded:
    """What was loaded: by which version, on how many ranks, how many parameters in all."""

    version: str
    ranks: int
    parameters: int


def needed_version(target: str) -> str:
    """The installed version, if it reads this target.

    Raises:
        MissingPackageError: TensorRT-LLM is not installed, or this version reads another layout.
    """
    found = version(PACKAGE)
    if not found:
        raise MissingPackageError(
            "--with-tensorrt-llm needs TensorRT-LLM, which is not installed here: "
            "pip install 'fuseport[trtllm]', or leave the option out"
        )
    release = _release(found)
    if target == "trtllm" and release > LAST_UNIFIED:
        raise MissingPackageError(
            f"TensorRT-LLM {found} is installed, but only versions up to 1.2 read unified "
            f"checkpoints; install one of them, or convert with --target hf"
        )
    if target == "hf" and release < FIRST_HF:
        raise MissingPackageError(
            f"TensorRT-LLM {found} is installed, but only versions from 1.3 on are asked to read "
            f"the Hugging Face layout; install one of them, or convert with --target trtllm"
        )
    return found


def _release(text: str) -> Release:
    """The first two numbers of a version: "1.3.0rc4" → (1, 3)."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def load_with_package(out: Path, target: str) -> Loaded:
    """Load a converted checkpoint with the installed package.

    Args:
        out: the converted directory.
        target: the recipe's.

    Raises:
        MissingPackageError: see `needed_version`; or the package cannot be imported.
        VerificationError: it does not take the checkpoint.
    """
    found = needed_version(target)
    try:
        # The package greets on the standard output, which may be for JSON.
        with contextlib.redirect_stdout(sys.stderr):
            ranks, parameters = LOADERS[target](str(out))
    except ImportError as error:
        raise MissingPackageError(
            f"TensorRT-LLM {found} is installed, but cannot be used here: {error}"
        ) from error
    # Whatever it raises, it does not take the checkpoint.
    except Exception as error:
        raise VerificationError(
            f"TensorRT-LLM {found} cannot load {out}: {type(error).__name__}: {error}"
        ) from error
    return Loaded(found, ranks, parameters)


def _load_unified(out: str) -> tuple[int, int]:
    """Load every rank; (ranks, parameters)."""
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    config = PretrainedConfig.from_checkpoint(out)
    model_class = MODEL_MAP[config.architecture]
    ranks, parameters = config.mapping.world_size, 0
    for rank in range(ranks):
        # Loading sets the rank of the config that it is given.
        model = model_class.from_checkpoint(out, rank=rank, config=copy.deepcopy(config))
        parameters += sum(1 for _ in model.named_parameters())
    return ranks, parameters


def _load_hf(out: str) -> tuple[int, int]:
    """Load the whole model on one GPU; (1, parameters)."""
    from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader
    from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
    from tensorrt_llm.mapping import Mapping

    loader, mapping = HfCheckpointLoader(), Mapping()
    try:
        config = loader.load_config(out, mapping=mapping)
        model = AutoModelForCausalLM.from_config(config).to("cuda")
        weights = loader.load_weights(out, mapping=mapping)
        mapper = loader.get_initialized_weight_mapper(model, config)
        # Some models bring a way of their own to load.
        takes = inspect.signature(model.load_weights).parameters
        options = {"weight_mapper": mapper} if "weight_mapper" in takes else {}
        model.load_weights(weights, **options)
        return 1, sum(1 for _ in model.named_parameters())
    finally:
        loader.cleanup()


LOADERS: dict[str, Callable[[str], tuple[int, int]]] = {"trtllm": _load_unified, "hf": _load_hf}
