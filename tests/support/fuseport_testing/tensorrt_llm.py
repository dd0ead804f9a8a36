"""Stand-ins for TensorRT-LLM with recorded signatures: a call that does not fit one is an error.

The signatures, not the code, were read from NVIDIA/TensorRT-LLM on GitHub, at the commits that
`SOURCES` names. `tests/converter/test_trtllm_package.py` compares them with the package itself
where it is installed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from safetensors import safe_open

# File → commit of the version that was read.
SOURCES = {
    "tensorrt_llm/models/modeling_utils.py": "01ea6d79d454bb3ab10c7510a6f706ba039090c2",
    "tensorrt_llm/models/__init__.py": "02267d3d4fd886c3ad036f6580beb0847eac6e4b",
    "tensorrt_llm/mapping.py": "05ebebb2c1d34320db9019f2b7ace6009a67e997",
    "tensorrt_llm/_torch/models/checkpoints/hf/checkpoint_loader.py": (
        "0d93193ee668a2bb6daf5fb231039233a63e60a3"
    ),
    "tensorrt_llm/_torch/models/checkpoints/base_checkpoint_loader.py": (
        "03427565a3a93da4ad9e5485e356951c5cf590ab"
    ),
    "tensorrt_llm/_torch/models/modeling_auto.py": "01bffee125e24ebe5b4a63437840a9422eb70868",
    "tensorrt_llm/_torch/models/modeling_utils.py": "000a01de66f0eab4ab05640711f0253f50f5209c",
}

UNIFIED = "tensorrt_llm.models"
LOADER = "tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader"
AUTO = "tensorrt_llm._torch.models.modeling_auto"
MODELS = "tensorrt_llm._torch.models.modeling_utils"
MAPPING = "tensorrt_llm.mapping"

# Module and name → signature, without types; `self` and `cls` left out.
SIGNATURES = {
    (UNIFIED, "PretrainedConfig.from_checkpoint"): "(ckpt_dir)",
    (UNIFIED, "PretrainedModel.from_checkpoint"): (
        "(ckpt_dir, rank=None, config=None, *, preprocess_weights_hook=None)"
    ),
    (LOADER, "HfCheckpointLoader"): (
        "(*, weight_loader=None, weight_mapper=None, config_loader=None)"
    ),
    (LOADER, "HfCheckpointLoader.load_config"): "(checkpoint_dir, **kwargs)",
    (LOADER, "HfCheckpointLoader.load_weights"): "(checkpoint_dir, mapping, **kwargs)",
    (LOADER, "HfCheckpointLoader.get_initialized_weight_mapper"): "(model, config)",
    (LOADER, "HfCheckpointLoader.cleanup"): "()",
    (AUTO, "AutoModelForCausalLM.from_config"): "(config)",
    (MODELS, "DecoderModelForCausalLM.load_weights"): (
        "(weights, weight_mapper=None, skip_modules=[])"
    ),
    (MAPPING, "Mapping"): (
        "(world_size=1, rank=0, gpus_per_node=8, *, cp_size=1, cp_config=None, tp_size=1,"
        " pp_size=1, moe_cluster_size=-1, moe_tp_size=-1, moe_ep_size=-1, attn_tp_size=-1,"
        " attn_cp_size=-1, auto_parallel=False, enable_attention_dp=False)"
    ),
}

Calls = list[tuple[str, dict[str, Any]]]


def signature(module: str, name: str) -> inspect.Signature:
    """A recorded signature."""
    scope: dict[str, Any] = {}
    exec(f"def recorded{SIGNATURES[module, name]}: ...", scope)
    return inspect.signature(scope["recorded"])


def recorded(
    calls: Calls, module: str, name: str, action: Callable[..., Any]
) -> Callable[..., Any]:
    """A function of a recorded signature, which notes its calls."""
    expected = signature(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = dict(expected.bind(*args, **kwargs).arguments)
        calls.append((name, bound))
        return action(**bound)

    call.__signature__ = expected  # type: ignore[attr-defined]
    return call


def unified(calls: Calls, extra: tuple[str, ...] = ()) -> dict[str, ModuleType]:
    """The package up to 1.2: its models need what each rank's file holds, and `extra`."""

    def read_config(ckpt_dir: str) -> Any:
        values = json.loads((Path(ckpt_dir) / "config.json").read_text())
        mapping = SimpleNamespace(**values.pop("mapping"), rank=0)
        return SimpleNamespace(**values, mapping=mapping)

    def load(ckpt_dir: str, rank: int, config: Any) -> Any:
        config.mapping.rank = rank
        with safe_open(Path(ckpt_dir) / f"rank{rank}.safetensors", "pt") as file:
            names = list(file.keys())
        if extra:
            raise RuntimeError(f"Required but not provided tensors:{set(extra)}")
        return SimpleNamespace(named_parameters=lambda: ((name, None) for name in names))

    config_class = SimpleNamespace(
        from_checkpoint=recorded(calls, UNIFIED, "PretrainedConfig.from_checkpoint", read_config)
    )
    model_class = SimpleNamespace(
        from_checkpoint=recorded(calls, UNIFIED, "PretrainedModel.from_checkpoint", load)
    )
    models = {"LlamaForCausalLM": model_class}
    return dict(_modules({UNIFIED: {"MODEL_MAP": models, "PretrainedConfig": config_class}}))


def hugging_face(calls: Calls, *, broken: bool = False) -> dict[str, ModuleType]:
    """The package from 1.3 on."""

    def load_weights(checkpoint_dir: str, mapping: object) -> dict[str, object]:
        names: dict[str, object] = {}
        for path in Path(checkpoint_dir).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names |= dict.fromkeys(file.keys())
        return names

    class Model:
        def __init__(self) -> None:
            self.names: list[str] = []
            name = "DecoderModelForCausalLM.load_weights"
            self.load_weights = recorded(calls, MODELS, name, self._load)

        def to(self, device: str) -> Model:
            calls.append(("to", {"device": device}))
            return self

        def _load(self, weights: dict[str, object], weight_mapper: object) -> None:
            if broken:
                raise KeyError("model.norm.weight")
            self.names = list(weights)

        def named_parameters(self) -> Iterator[tuple[str, None]]:
            return ((name, None) for name in self.names)

    actions: dict[str, Callable[..., Any]] = {
        "load_config": lambda checkpoint_dir, kwargs: SimpleNamespace(**kwargs),
        "load_weights": load_weights,
        "get_initialized_weight_mapper": lambda model, config: "mapper",
        "cleanup": lambda: None,
    }
    methods = {
        name: recorded(calls, LOADER, f"HfCheckpointLoader.{name}", action)
        for name, action in actions.items()
    }
    loader = recorded(calls, LOADER, "HfCheckpointLoader", lambda: SimpleNamespace(**methods))
    make = recorded(calls, AUTO, "AutoModelForCausalLM.from_config", lambda config: Model())
    mapping = recorded(calls, MAPPING, "Mapping", lambda: "mapping")
    contents: dict[str, dict[str, object]] = {
        LOADER: {"HfCheckpointLoader": loader},
        AUTO: {"AutoModelForCausalLM": SimpleNamespace(from_config=make)},
        MAPPING: {"Mapping": mapping},
    }
    return dict(_modules(contents))


def _modules(contents: dict[str, dict[str, object]]) -> Iterator[tuple[str, ModuleType]]:
    """Modules with their contents, and the packages around them."""
    for path in contents:
        parts = path.split(".")
        for end in range(1, len(parts)):
            package = ModuleType(".".join(parts[:end]))
            package.__path__ = []
            yield package.__name__, package
    for path, values in contents.items():
        module = ModuleType(path)
        module.__path__ = []
        vars(module).update(values)
        yield path, module
