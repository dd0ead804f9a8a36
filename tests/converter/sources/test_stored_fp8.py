"""fp8 weights as Transformer Engine keeps them, imitated by classes with its names."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from fuseport_testing.te_tensors import (
    DType,
    Float8BlockwiseQTensor,
    Float8Tensor,
    Float8TensorStorage,
    MXFP8Tensor,
    Parameter,
    blockwise,
    codes,
    mx,
)

from fuseport.converter.errors import ScaleError, ShapeError, UnsupportedOptionError
from fuseport.converter.sources.stored_fp8 import dequantise, is_stored_fp8, read_stored_fp8


def values(raw):
    return raw.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("kind", [Float8Tensor, Float8TensorStorage, Parameter])
def test_per_tensor(kind):
    weight = kind(codes(5, 7), torch.tensor([0.25]))
    assert is_stored_fp8(weight)
    stored = read_stored_fp8(weight, "w")
    assert stored.scheme == "tensor"
    assert stored.codes.dtype is torch.float8_e4m3fn
    assert stored.codes.data_ptr() == weight._data.data_ptr()
    assert stored.scales.tolist() == [0.25]
    assert np.array_equal(dequantise(stored).numpy(), values(weight._data) * np.float32(0.25))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 700), (300, 512)])
def test_blockwise(shape):
    weight, scales = blockwise(*shape)
    stored = read_stored_fp8(weight, "w")
    assert stored.scheme == "block128"
    assert torch.equal(stored.scales, scales)
    assert torch.equal(stored.codes.view(torch.uint8), weight._rowwise_data)
    rows, columns = np.indices(shape)
    expected = values(weight._rowwise_data) * scales.numpy()[rows // 128, columns // 128]
    assert np.array_equal(dequantise(stored).numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 32), (128, 128), (129, 160), (300, 64)])
@pytest.mark.parametrize("attributes", [{}, {"_with_gemm_swizzled_scales": False}])
def test_mx(shape, attributes):
    weight, scales = mx(*shape, **attributes)
    stored = read_stored_fp8(weight, "w")
    assert stored.scheme == "mx32"
    assert torch.equal(stored.scales, scales)
    rows, columns = np.indices(shape)
    wide = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    expected = values(weight._rowwise_data) * wide[rows, columns // 32]
    assert np.array_equal(dequantise(stored).numpy(), expected)


def test_plain_tensors_are_not_stored_fp8():
    assert not is_stored_fp8(torch.zeros(2))
    with pytest.raises(UnsupportedOptionError, match="w is a Tensor, which is none of"):
        read_stored_fp8(torch.zeros(2), "w")


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-40, float("inf"), float("nan")])
def test_unusable_scales_are_named(bad):
    with pytest.raises(ScaleError, match="w: 1 of 1 scales"):
        read_stored_fp8(Float8Tensor(codes(3, 3), torch.tensor([bad])), "w")
    weight, _ = blockwise(129, 300)
    weight._rowwise_scale_inv[1, 2] = bad
    with pytest.raises(ScaleError, match=r"w: 1 of 6 scales.*first at \[1, 2\]"):
        read_stored_fp8(weight, "w")


def test_an_e8m0_nan_is_named():
    weight, _ = mx(3, 64)
    weight._rowwise_scale_inv[2, 1] = 0xFF
    with pytest.raises(ScaleError, match=r"first at \[2, 1\]"):
        read_stored_fp8(weight, "w")


REFUSED = [
    (Float8Tensor(codes(3, 3), torch.ones(1), DType.kFloat8E5M2), "kFloat8E5M2"),
    (Float8Tensor(codes(3, 3), torch.ones(1), "e4m3"), "unknown"),
    (Float8Tensor(None, torch.ones(1)), "_data is missing"),
    (Float8Tensor(codes(3, 3).short(), torch.ones(1)), "_data is torch.int16"),
    (Float8Tensor(codes(3, 3), torch.ones(1).half()), "_scale_inv is torch.float16"),
    (Float8Tensor(codes(3, 3), 1.0), "_scale_inv is float"),
    (Float8BlockwiseQTensor(codes(3, 3), torch.ones(1, 4), two=False), "1×128"),
    (Float8BlockwiseQTensor(None, torch.ones(1, 4)), "_rowwise_data is missing"),
    (blockwise(3, 3)[0].__class__(codes(3, 3), torch.ones(1, 4), True, DType.kByte), "kByte"),
    (mx(3, 32, _with_gemm_swizzled_scales=True)[0], "swizzled"),
    (MXFP8Tensor(codes(3, 32), torch.zeros(128, 4)), "_rowwise_scale_inv is torch.float32"),
]


@pytest.mark.parametrize(("weight", "message"), REFUSED)
def test_what_is_not_converted_is_named(weight, message):
    with pytest.raises(UnsupportedOptionError, match=f"w.*{message}"):
        read_stored_fp8(weight, "w")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Float8Tensor(codes(3, 3), torch.ones(2)), r"scales \[2\], expected \[1\]"),
        (Float8Tensor(codes(3, 3)[None], torch.ones(1)), "expected a matrix"),
        (Float8BlockwiseQTensor(codes(3, 3), torch.ones(1, 1)), r"\[1, 1\], expected \[1, 4\]"),
        (Float8BlockwiseQTensor(codes(200, 3), torch.ones(1, 4)), r"expected \[2, 4\]"),
        (MXFP8Tensor(codes(3, 33), torch.zeros(128, 4).byte()), "multiple of 32"),
        (MXFP8Tensor(codes(3, 32), torch.zeros(3, 1).byte()), r"expected \[128, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(weight, message):
    with pytest.raises(ShapeError, match=message):
        read_stored_fp8(weight, "w")
