"""Lets vLLM run or load checkpoints: for an interpreter that has vLLM, and not this package.

    python vllm_child.py OUT/jobs.json OUT

`jobs.json` is a list of `{"name", "path", "how", "dtype", "tokens"}`. `OUT/{name}.pt` is what came
of a job, and `OUT/errors.json` says what went wrong: name → text, or null.

- "logits": vLLM's engine runs `tokens`: log-probabilities fp32 [tokens - 1, vocabulary] of each
  next token.
- "parameters": vLLM's own model filled by vLLM's own loaders, as it is before kernels want it
  otherwise: `{"parameters": name → tensor, "unfilled": names}`. A CPU has no kernels for most
  schemes, so their choice, and nothing else, is mocked.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# vLLM reads them when it is imported.
os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip

import torch
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry

State = dict[str, torch.Tensor]
Job = dict[str, Any]
COMMON: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "max_num_seqs": 2}
# Where vLLM chooses a scheme's kernels.
SCHEMES = (
    "modelopt", "fp8", "compressed_tensors.schemes.compressed_tensors_w8a8_fp8",
    "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8",
)  # fmt: skip


def logits(job: Job) -> torch.Tensor:
    """Log-probabilities of every next token of a prompt."""
    size = json.loads(Path(job["path"], "config.json").read_text())["vocab_size"]
    engine = LLM(model=job["path"], dtype=job["dtype"], max_logprobs=size, **COMMON)
    options = SamplingParams(max_tokens=1, prompt_logprobs=size, detokenize=False)
    prompt: Any = {"prompt_token_ids": job["tokens"]}
    (answer,) = engine.generate([prompt], options, use_tqdm=False)
    rows = answer.prompt_logprobs[1:]
    return torch.tensor([[row[token].logprob for token in range(size)] for row in rows])


def parameters(job: Job) -> dict[str, object]:
    """Parameters as vLLM's loaders leave them, and the names of those that they leave in part."""
    config = EngineArgs(model=job["path"], dtype=job["dtype"], **COMMON).create_engine_config()
    with no_kernels(), set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{job['rendezvous']}", 0, "gloo")
        initialize_model_parallel()
        model = initialize_model(config)
        first, second = (fill(model, config, poison) for poison in (0x00, 0xFF))
    unfilled = [n for n in first if not torch.equal(as_bytes(first[n]), as_bytes(second[n]))]
    return {"parameters": first, "unfilled": unfilled}


def fill(model: Any, config: Any, poison: int) -> State:
    """Every parameter after a load; what the loaders leave out is poison."""
    for parameter in model.parameters():
        as_bytes(parameter.data).fill_(poison)
    loader: Any = get_model_loader(config.load_config)
    model.load_weights(loader.get_all_weights(config.model_config, model))
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def no_kernels() -> Iterator[None]:
    """Parameters and loaders do not depend on the kernel; a CPU has none for most schemes."""
    with ExitStack() as stack:
        for scheme in SCHEMES:
            module = importlib.import_module(f"vllm.model_executor.layers.quantization.{scheme}")
            for name in dir(module):
                if name.startswith("init_") and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name))
                elif name.startswith("select_") and name.endswith("_backend"):
                    # A backend, and the class of its experts.
                    stack.enter_context(
                        mock.patch.object(module, name, return_value=[mock.Mock()] * 2)
                    )
        yield


def register(path: str) -> None:
    """Look at a model's class here; vLLM would start a process that imports it all once more."""
    for name in json.loads(Path(path, "config.json").read_text())["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


HOW = {"logits": logits, "parameters": parameters}


def main() -> None:
    """Do every job, whatever comes of the others."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    errors: dict[str, str | None] = {}
    for job in jobs:
        job["rendezvous"] = out / f"{job['name']}.rendezvous"
        try:
            register(job["path"])
            torch.save(HOW[job["how"]](job), out / f"{job['name']}.pt")
            errors[job["name"]] = None
        except Exception:
            errors[job["name"]] = traceback.format_exc()
        cleanup_dist_env_and_memory()
        (out / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
