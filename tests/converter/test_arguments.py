"""Wrong kinds of arguments end in an error that names the argument, and what it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from fuseport_testing.smallest import FACTS, SHAPES
from fuseport_testing.tiny import write_tiny

from fuseport.converter import (
    FuseportError,
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    export_state_dict,
    plan_checkpoint,
    verify_checkpoint,
)
from fuseport.converter.errors import (
    FuseportWarning,
    MissingTensorError,
    RecipeError,
    ScaleError,
)
from fuseport.converter.limits import Limits
from fuseport.converter.megatron import (
    DistributedTRTLLMModelWeightsConverter,
    Parallel,
    SingleDeviceTRTLLMModelWeightsConverter,
)
from fuseport.converter.refit import Refit
from fuseport.converter.shards import Place
from fuseport.converter.stages import chunks_as_one
from fuseport.kernels.quant import GivenScale

SPEC = ModelSpec(**FACTS)  # type: ignore[arg-type]
STATE: dict[Any, Any] = {name: torch.ones(shape) for name, shape in SHAPES.items()}
ONE = "decoder.layers.0.mlp.linear_fc2.weight"
ON_META = GivenScale(torch.ones(1, device="meta"))
LOSSY = Recipe(kv_cache="fp8")
HF, FC = Recipe(target="hf"), "transformer.layers.0.mlp.fc"


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def freed() -> torch.Tensor:
    tensor = torch.ones(SHAPES[ONE])
    tensor.untyped_storage().resize_(0)
    return tensor


def ways(state: Any, spec: Any, recipe: Any, **options: Any) -> Iterator[Callable[[], object]]:
    """The three doors for weights in memory."""
    yield lambda: convert_state_dict(state, spec, recipe, **options)
    yield lambda: export_state_dict(state, spec, recipe, "never-made", **options)
    yield lambda: Refit(state, spec, recipe, **options)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (torch.nn.Linear(2, 2), r"state_dict must be .* model.state_dict\(\), found Linear"),
        (None, "state_dict must be .*, found None"),
        ((item for item in STATE.items()), "found generator"),
        ({"model": STATE}, r"no tensors \(its keys: model\)"),
        ({"model.embed_tokens.weight": torch.ones(1)}, "has Hugging Face's names"),
        ({**STATE, 3: torch.ones(1)}, "the key 3"),
        ({**STATE, ONE: torch.ones(SHAPES[ONE], device="meta")}, f"{ONE}.* on meta, has no values"),
        ({**STATE, ONE: freed()}, f"{ONE}.* has no values"),
        ({**STATE, ONE: torch.ones(SHAPES[ONE]).to_sparse()}, f"{ONE} .*sparse_coo"),
        ({**STATE, ONE: Elsewhere(SHAPES[ONE])}, f"{ONE} is on cuda:0 and .* on cpu"),
        ({**STATE, ONE: np.ones(SHAPES[ONE])}, f"{ONE} is a ndarray, expected a torch.Tensor"),
        ({**STATE, ONE: torch._neg_view(torch.ones(SHAPES[ONE]))}, f"{ONE} is a negative view"),
        ({**STATE, ONE: torch.nn.UninitializedParameter()}, f"{ONE}, .* has no values"),
        ({**STATE, f"module.{ONE}": torch.ones(1)}, f"twice, as {ONE} and module.{ONE}"),
        ({**STATE, "a\x1b[2J\n": torch.ones(1)}, r"call for: a\\x1b\[2J\\n;"),
    ],
    ids=[
        "module",
        "none",
        "generator",
        "nested",
        "hf",
        "key",
        "meta",
        "freed",
        "sparse",
        "device",
        "numpy",
        "negative",
        "uninitialised",
        "twice",
        "unprintable",
    ],
)
def test_what_is_no_state_dict(state: Any, words: str) -> None:
    for way in ways(state, SPEC, HF):
        with pytest.raises(FuseportError, match=words):
            way()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spec": {}}, "spec must be a ModelSpec, found dict"),
        ({"recipe": "hf"}, "recipe must be a Recipe, found 'hf'"),
        ({"recipe": Recipe, "spec": SPEC}, "recipe must be a Recipe, found the class Recipe"),
        ({"scales": {FC: 0.5}}, f"{FC} has a float, expected a GivenScale"),
        (
            {"scales": {FC: ON_META}},
            "on meta, expected one on cpu",
        ),
        ({"scales": {FC: GivenScale(0.0)}}, f"{FC}: quant_scale is 0.0, expected"),
        ({"scales": {FC: GivenScale(1e-45)}}, f"{FC}: quant_scale is 1e-45, expected"),
        ({"scales": {"model.layers.0.mlp": GivenScale(0.5)}}, "model.layers.0.mlp is no module"),
    ],
    ids=["spec", "recipe", "class", "float", "device", "zero", "subnormal", "unknown"],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    given = {"spec": SPEC, "recipe": Recipe(), **arguments}
    for way in ways(STATE, **given):
        with pytest.raises(FuseportError, match=words):
            way()


def test_a_refits_own_arguments() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"place": {}}, "place must be a Place, found dict"),
        ({"place": Place(tp_size=2)}, "tp_size 2 .* the group has 1"),
        ({"wants": 0}, "wants must be a list"),
        ({"group": "x"}, "group must be a process group .* found 'x'"),
        ({"wants": [0, 0]}, "each to be named once"),
        ({"outputs": {}}, "outputs must be a list of dicts"),
        ({"outputs": []}, "outputs has 0 dicts"),
    ]
    for arguments, words in wrong:
        with pytest.raises(FuseportError, match=words):
            Refit(STATE, SPEC, HF, **arguments)
    with pytest.raises(RecipeError, match="tp_size must be whole numbers"):
        Place(tp_size="2")  # type: ignore[arg-type]
    refit = Refit(STATE, SPEC, HF)
    with pytest.raises(FuseportError, match="nbytes must be a whole number of bytes, found '1MB'"):
        next(refit.buckets("1MB"))  # type: ignore[arg-type]
    with pytest.raises(FuseportError, match=r"source must be a mapping .* found Linear"):
        refit.run(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(FuseportError, match=r"no torch.Tensor where one was planned"):
        refit.run({name: tensor.numpy() for name, tensor in STATE.items()})


def test_wrong_arguments_for_files(tmp_path: Path) -> None:
    source, out, loop = write_tiny(tmp_path / "source"), tmp_path / "out", tmp_path / "loop"
    loop.symlink_to(loop)
    wrong: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any], str]] = [
        (convert_checkpoint, (None, out), {}, "source must be a path, .* found None"),
        (convert_checkpoint, (source, 3), {}, "out must be a path, .* found 3"),
        (convert_checkpoint, (source, out, "hf"), {}, "recipe must be a Recipe, found 'hf'"),
        (convert_checkpoint, (source, out), {"facts": Namespace()}, "facts .* found Namespace"),
        (
            convert_checkpoint,
            (source, out),
            {"facts": {1: 2}},
            "'1' is not the name of a model fact",
        ),
        (convert_checkpoint, (source, out), {"device": 0}, "device '0' is none of"),
        (convert_checkpoint, (source, out), {"limits": 1 << 30}, "limits must be Limits"),
        (convert_checkpoint, (source, out), {"progress": None}, "progress must be a function"),
        (convert_checkpoint, (source, out), {"overwrite": "no"}, "overwrite must be True or False"),
        (convert_checkpoint, ("", out), {}, "source must be a path, .* found ''"),
        (convert_checkpoint, (source, "a\0b"), {}, r"out must be a path, .* found 'a\\x00b'"),
        (convert_checkpoint, (source, loop / "out"), {}, "cannot write"),
        (convert_checkpoint, (source, out), {"assets": tmp_path / "no"}, "assets .*no directory"),
        (convert_checkpoint, (source, out), {"group": "x"}, "group must be a Group, .* found 'x'"),
        (convert_checkpoint, (source, out), {"timings": True}, "timings must be Timings"),
        (convert_checkpoint, (plan_checkpoint(source, HF), out, HF), {}, "a plan has its recipe"),
        (plan_checkpoint, (source, None), {}, "recipe must be a Recipe, found None"),
        (verify_checkpoint, (None,), {}, "out must be a path"),
        (Limits, (1 << 30, "2GiB"), {}, "host_memory must be a whole number of bytes"),
        (ModelSpec.from_facts, (Namespace(),), {}, r"facts must be a mapping .* vars\("),
    ]
    for call, arguments, options, words in wrong:
        with pytest.raises(FuseportError, match=words):
            call(*arguments, **options)
    assert not out.exists()


def test_a_dtype_is_named() -> None:
    with pytest.raises(RecipeError, match=r"is none of bfloat16, .* as a str"):
        Recipe(dtype=torch.bfloat16)  # type: ignore[arg-type]


def test_warnings_name_the_callers_line() -> None:
    for call in (lambda: convert_state_dict(STATE, SPEC, LOSSY), lambda: Refit(STATE, SPEC, LOSSY)):
        with pytest.warns(FuseportWarning, match="no scales of the KV cache") as caught:
            call()
        assert [one.filename for one in caught] == [__file__]


def test_home_and_torchs_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "source")
    convert_checkpoint("~/source", "~/out", device=torch.device("cpu"))
    assert verify_checkpoint("~/out", "~/source").accounting is not None
    assert not Path("~").exists()


def test_odd_members_are_taken() -> None:
    """Parameters, views, expanded and tied tensors; what Transformer Engine leaves beside them."""
    table = torch.randn(SHAPES["output_layer.weight"])
    odd = {
        "decoder.layers.0.mlp.linear_fc1._extra_state": Elsewhere(3),
        **{name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()},
        ONE: torch.ones(()).expand(SHAPES[ONE]),
        "output_layer.weight": table.t().contiguous().t(),
        "embedding.word_embeddings.weight": table,
        "decoder.layers.0.mlp.linear_fc2._extra_state": None,
    }
    plain = {**STATE, "output_layer.weight": table, "embedding.word_embeddings.weight": table}
    for recipe in (HF, Recipe(target="hf", quant="fp8-block")):
        (expected,) = convert_state_dict(plain, SPEC, recipe)
        (found,) = convert_state_dict(odd, SPEC, recipe)  # type: ignore[arg-type]
        for name, tensor in expected.items():
            assert not found[name].requires_grad
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_given_scales_of_another_dtype_are_refused() -> None:
    """A kernel would read the bytes as fp32."""
    with pytest.raises(ValueError, match="quant_scale must be an fp32 tensor of one element"):
        GivenScale(torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="quant_scale must be a number or a tensor, found str"):
        GivenScale("1")  # type: ignore[arg-type]
    with pytest.raises(ScaleError, match="positive"):
        convert_state_dict(STATE, SPEC, Recipe(), scales={FC: GivenScale(-1.0)})


CONFIG = Namespace(**FACTS, gated_linear_unit=True, normalization="RMSNorm", num_moe_experts=None)
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
FACTOR = f"{FC}.weights_scaling_factor"


def drop_in(state: Any = STATE, vocab: Any = 32, names: Any = None, **changed: Any) -> object:
    """A conversion by the distributed drop-in, with some arguments changed."""
    given = {"transformer_config": CONFIG, "dtype": "bfloat16", "activation": "swiglu", **changed}
    given.setdefault("parallel", Parallel())
    converter = DistributedTRTLLMModelWeightsConverter(**given)
    converter.convert(state, {} if names is None else names, vocab)
    return converter


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": torch.nn.Linear(2, 2)}, "state_dict must be .* found Linear"),
        ({"state": {**STATE, ONE: torch.ones(8, 16, device="meta")}}, f"{ONE}.* has no values"),
        ({"vocab": None}, "tokenizer_vocab_size must be a whole number of rows, found None"),
        ({"vocab": 0}, "tokenizer_vocab_size must be at least 1, found 0"),
        ({"vocab": np.int64(0)}, "tokenizer_vocab_size must be at least 1, found 0"),
        ({"names": [1]}, "trtllm_conversion_dict must be a mapping .* found list"),
        ({"names": dict.fromkeys((FC1, FC2), "transformer.layers.mlp.fc.weight")}, "both become"),
        ({"names": {ONE: "x", "decoder.layers.mlp.linear_fc2.weight": "x"}}, "becomes 'x'"),
        ({"transformer_config": vars(CONFIG)}, "transformer_config must be .* found dict"),
        ({"dtype": ["bfloat16"]}, "is none of bfloat16"),
        ({"parallel": (1, 0)}, "parallel must be a Parallel, found tuple"),
        ({"quantisation": "fp8"}, "quantisation must be a Recipe, found 'fp8'"),
        ({"quantisation": Recipe(quant="fp8", keep_first=1)}, "keep_first = 1 is not taken over"),
        ({"vocab": True}, "tokenizer_vocab_size must be a whole number of rows, found True"),
        ({"state": MappingProxyType(STATE), "consume": True}, "mappingproxy cannot be emptied"),
        ({"scales": {3: 1}}, "scales has the key 3"),
        ({"scales": {FACTOR: {}}}, f"{FACTOR} must be a dict with one number"),
        *(
            ({"scales": {FACTOR: {"weight_multiplier": value}}}, f"scales: .*{FACTOR} .*{words}")
            for value, words in (
                (0, "is 0, expected"),
                (np.array([float("nan")]), "is nan, expected"),
                (torch.tensor([-1.0]), "is -1.0, expected"),
                (torch.ones(1, device="meta"), "one number"),
                (np.array([1j]), "one number"),
                (torch.ones(2), "one number"),
            )
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_drop_in(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(FuseportError, match=words):
        drop_in(**changed)


def test_wrong_arguments_of_the_single_device_drop_in() -> None:
    with pytest.raises(RecipeError, match=r"export_config must be .* found NoneType"):
        SingleDeviceTRTLLMModelWeightsConverter(None, CONFIG, "bfloat16")
    sizes = Namespace(inference_tp_size=1, inference_pp_size=1, use_parallel_embedding=False)
    converter = SingleDeviceTRTLLMModelWeightsConverter(sizes, CONFIG, "bfloat16")
    with pytest.raises(MissingTensorError, match=r"call convert .* first"):
        converter.get_padded_vocab_size()
    with pytest.raises(RecipeError, match=r"mapping must be .* which has no tp_size"):
        converter.get_local_model_weights_per_gpu(None, None)


def test_wrong_places() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tp_group": "x"}, "tp_group must be a process group .* found 'x'"),
        ({"pp_group": 3}, "pp_group must be a process group .* found 3"),
        ({"ep_size": "2"}, "ep_size '2' does not divide"),
    ]
    with pytest.raises(RecipeError, match="first_layer must be a layer's number, found 'x'"):
        Place(first_layer="x")  # type: ignore[arg-type]
    for chunks, layers, place, words in (
        ([STATE], None, (0, 1), "num_layers must be a whole number of layers, found None"),
        ([None], 1, (0, 1), "state_dict must be a mapping"),
        ([], 1, (0, 1), "1 layers in 0 chunks"),
        ([STATE], 1, (1, 1), "pp_rank 1 is outside pp_size 1"),
    ):
        with pytest.raises(FuseportError, match=words):
            chunks_as_one(chunks, layers, pp_rank=place[0], pp_size=place[1])  # type: ignore[arg-type]
    for arguments, words in wrong:
        with pytest.raises(RecipeError, match=words):
            Parallel(**arguments)
    with pytest.raises(RecipeError, match="call init_process_group"):
        Parallel.from_groups(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "number", [np.int64, np.uint16, torch.tensor], ids=["int64", "uint16", "tensor"]
)
def test_scalars_of_numpy_and_torch_are_numbers(number: Callable[[int], Any]) -> None:
    numbers = {name: number(value) for name, value in FACTS.items()}
    spec, read = ModelSpec(**numbers), ModelSpec.from_facts(numbers, rotary_base=number(5000))
    assert spec == SPEC
    for one in (spec, read, Recipe(tp_size=number(2))):
        # As what they are they would end in the manifest.
        assert json.loads(json.dumps(dataclasses.asdict(one)))
    assert ModelSpec.from_facts(FACTS, layernorm_epsilon=np.float32(0.25)).layernorm_epsilon == 0.25
    with pytest.raises(FuseportError, match=r"num_layers must be a whole number .* found 1.5"):
        ModelSpec.from_facts(FACTS, num_layers=np.float64(1.5))
    with pytest.raises(FuseportError, match="num_layers must be a whole number"):
        ModelSpec.from_facts(FACTS, num_layers=torch.tensor(1, device="meta"))


def test_lists_and_arrays_are_facts_too() -> None:
    experts = {**FACTS, "num_moe_experts": 2, "moe_ffn_hidden_size": 8, "moe_router_topk": 1}
    spec = ModelSpec(**experts, moe_layers=[True])  # type: ignore[arg-type]
    assert spec.moe_layers == (True,)
    assert ModelSpec.from_facts(experts, moe_layers=np.array([1])).moe_layers == (True,)
    with pytest.raises(FuseportError, match="gated_linear_unit must be true or false"):
        ModelSpec.from_facts(FACTS, gated_linear_unit=np.ones(2))


def test_a_recipes_scales() -> None:
    given = {"*.fc": MappingProxyType({"weight": np.float32(0.25)})}
    recipe = Recipe(scales=MappingProxyType(given))  # type: ignore[arg-type]
    given.clear()
    assert recipe.scales == {"*.fc": {"weight": 0.25}}
    assert json.dumps(dataclasses.asdict(recipe))
    with pytest.raises(ScaleError, match=r"scales must be a mapping .* found 'file.json'; .*load"):
        Recipe(scales="file.json")


def test_a_family_that_no_manifest_can_hold() -> None:
    with pytest.raises(RecipeError, match=r"family of the recipe .* set is not JSON"):
        Recipe(family={"like": "llama", "model_type": "mine", "written": {"a": {1}}})


def test_copies_of_plans_and_refits(tmp_path: Path) -> None:
    plan = plan_checkpoint(write_tiny(tmp_path / "source"), HF)
    for number, again in enumerate((copy.copy(plan), copy.deepcopy(plan))):
        convert_checkpoint(again, tmp_path / f"out{number}")
    with pytest.raises(RecipeError, match=r"a plan cannot be pickled; .* plan_checkpoint"):
        pickle.dumps(plan)
    refit = Refit(STATE, SPEC, HF)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RecipeError, match="a Refit cannot be copied or pickled"):
            way(refit)


def test_the_drop_in_takes_any_mapping_and_outlives_inference_mode() -> None:
    (expected,) = convert_state_dict(STATE, SPEC, Recipe())
    for output in ("host", "cuda"):
        with torch.inference_mode():
            converter: Any = drop_in(MappingProxyType(STATE), output=output)
        converter.convert(MappingProxyType(STATE), {}, 32)
        for name, tensor in converter.trtllm_model_weights.items():
            assert torch.equal(tensor, expected[name]), name
