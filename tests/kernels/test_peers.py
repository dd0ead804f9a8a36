"""Codes and scales beside those of other quantisers, where they are installed (extra `peers`).

Every code must be the peer's: of 393,216 none differed with transformers 5.24 (which multiplies
with a reciprocal), compressed-tensors 0.20, torchao 0.18 and ModelOpt 0.47.
"""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import BlockScale, MxScale, NvScale, RowScale, TensorScale
from fuseport.kernels.reference import fused_copy_ref

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, COLUMNS = 384, 1024
E4M3 = torch.float8_e4m3fn


def peer(name: str) -> Any:
    """A peer's module, or a skip that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    # A peer that is there may still fail on what it needs itself.
    except Exception as error:
        pytest.skip(f"{name} cannot be imported ({type(error).__name__}: {error})")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """[384, 1024], with rows of very different sizes, one of them all zeros."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.02
    values *= torch.logspace(-3, 1, ROWS)[:, None]
    values[5] = 0
    dtype: torch.dtype = request.param
    return values.to(dtype)


def ours(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, dequant_scales, and the second scale (or nothing that means anything)."""
    amax, second = torch.zeros(1), torch.zeros(1)
    makers: dict[str, Any] = {
        "tensor": lambda: TensorScale(torch.empty(1), amax),
        "row": lambda: RowScale(torch.empty(ROWS), COLUMNS),
        "block": lambda: BlockScale(torch.empty(ROWS // 128, COLUMNS // 128), COLUMNS),
        "mx": lambda: MxScale(torch.empty(ROWS, COLUMNS // 32, dtype=torch.uint8), COLUMNS),
        "nv": lambda: NvScale(
            torch.empty(ROWS, COLUMNS // 16).to(E4M3), COLUMNS, second_scale=second, amax=amax
        ),
    }
    quant = makers[scheme]()
    width = COLUMNS // 2 if scheme == "nv" else COLUMNS
    codes = torch.empty(ROWS, width, dtype=quant.codes)
    fused_copy_ref([Move(codes, weight, quant=quant)])
    return codes, quant.dequant_scale, second


def order(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 codes as numbers that count the steps between them; both zeros are one."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits > 127, 128 - bits, bits)


def order_e2m1(packed: torch.Tensor) -> torch.Tensor:
    bits = torch.stack([packed & 15, packed >> 4], -1).int()
    return torch.where(bits > 7, 8 - bits, bits)


def check(what: str, found: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal codes; a failure says how many differ, and by how many steps at most."""
    steps = order_e2m1 if found.dtype is torch.uint8 else order
    apart = (steps(found) - steps(theirs)).abs()
    count = int((apart > 0).sum())
    assert not count, f"{what}: {count} of {apart.numel()} differ, by at most {int(apart.max())}"


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    first, second = (each.float().flatten().view(torch.int32) for each in (one, other))
    return int((first - second).abs().max())


@pytest.mark.parametrize("scheme", ["tensor", "block"])
def test_transformers(scheme: str, weight: torch.Tensor) -> None:
    module = peer("transformers.integrations.finegrained_fp8")
    block = [128, 128] if scheme == "block" else None
    config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    operation = module.Fp8Quantize(SimpleNamespace(quantization_config=config))
    made = operation.convert({"a.weight": weight})
    codes, scales, _ = ours(weight, scheme)
    check(f"transformers {scheme}", codes, made["a.weight"])
    assert ulps(scales, made["a.weight_scale_inv"]) <= 1


def test_compressed_tensors(weight: torch.Tensor) -> None:
    quantization = peer("compressed_tensors.quantization")
    helpers = peer("compressed_tensors.quantization.utils.helpers")
    forward = peer("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel")
    wide = weight.float()
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    scale, zero = helpers.calculate_qparams(low, high, args)
    made = forward.quantize(wide, scale, zero, args, dtype=E4M3)
    codes, scales, _ = ours(weight, "row")
    check("compressed-tensors row", codes, made)
    filled = wide.abs().amax(1) > 0
    assert torch.equal(scales[filled], scale.view(-1)[filled])


@pytest.mark.parametrize("scheme", ["tensor", "row", "block"])
def test_torchao(scheme: str, weight: torch.Tensor) -> None:
    module = peer("torchao.quantization.quant_primitives")
    sizes = {"tensor": [ROWS, COLUMNS], "row": [1, COLUMNS], "block": [128, 128]}[scheme]
    # The row of zeros would divide by zero there.
    weight[5, 0] = 1e-3
    scale = module._choose_scale_float8(weight.float(), sizes)
    made = module._quantize_affine_float8(weight, scale)
    codes, scales, _ = ours(weight, scheme)
    check(f"torchao {scheme}", codes, made)
    assert torch.equal(scales.flatten(), scale.flatten())


def test_torchao_mx(weight: torch.Tensor) -> None:
    module = peer("torchao.prototype.mx_formats.mx_tensor")
    weight[5, 0::32] = 1e-3
    scale, made = module.to_mx(weight, E4M3, 32)
    codes, scales, _ = ours(weight, "mx")
    assert torch.equal(scales, scale.view(torch.uint8))
    check("torchao mx", codes, made)


def test_torchao_nv(weight: torch.Tensor) -> None:
    module = peer("torchao.prototype.mx_formats.nvfp4_tensor")
    codes, scales, second = ours(weight, "nv")
    scale, made = module.nvfp4_quantize(weight, per_tensor_scale=second[0])
    theirs = scale.view(scales.shape)
    # There no scale is below e4m3's smallest normal number, 2⁻⁶; here none is below 2⁻⁹.
    normal = (scales.float() > 2.0**-6) & (weight.view(ROWS, -1, 16).abs().amax(-1) > 0)
    apart = (order(scales) - order(theirs))[normal].abs()
    print(f"torchao nv: {float((apart > 0).double().mean()):.6f} of the scales differ")
    assert int(apart.max()) <= 1
    same = normal & (scales.view(torch.uint8) == theirs.view(torch.uint8))
    assert float(same.double().sum() / normal.double().sum()) > 0.999
    each = (one.view(torch.uint8).view(ROWS, -1, 8)[same] for one in (codes, made))
    check("torchao nv", *each)


def test_modelopt_tensor(weight: torch.Tensor) -> None:
    module = peer("modelopt.torch.export.quant_utils")
    codes, scales, _ = ours(weight, "tensor")
    made = module.to_quantized_weight(weight.float(), scales, "fp8")
    check("modelopt tensor", codes, made)


def test_modelopt_row(weight: torch.Tensor) -> None:
    module = peer("modelopt.torch.export.quant_utils")
    codes, scales, _ = ours(weight, "row")
    made = module.to_quantized_weight(weight.float(), scales, module.QUANTIZATION_FP8_PC_PT)
    check("modelopt row", codes, made)


def test_modelopt_mx(weight: torch.Tensor) -> None:
    """With our scales: ModelOpt rounds its own up, the OCP specification's are rounded down."""
    module = peer("modelopt.torch.export.quant_utils")
    codes, scales, _ = ours(weight, "mx")
    made = module.to_quantized_weight(weight.float(), scales, module.QUANTIZATION_MXFP8)
    check("modelopt mx", codes, made)


def test_modelopt_nv(weight: torch.Tensor) -> None:
    module = peer("modelopt.torch.export.quant_utils")
    tensors = peer("modelopt.torch.quantization.qtensor")
    codes, scales, second = ours(weight, "nv")
    scale, _ = tensors.NVFP4QTensor.get_weights_scaling_factor(weight.float(), 16, second[0])
    filled = weight.view(ROWS, -1, 16).abs().amax(-1) > 0
    assert torch.equal(scales.view(torch.uint8)[filled], scale.view(torch.uint8)[filled])
    made = module.to_quantized_weight(
        weight.float(), scales, module.QUANTIZATION_NVFP4, second[0], 16
    )
    check("modelopt nv", codes, made)
