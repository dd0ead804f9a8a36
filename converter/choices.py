"""The words that options choose from, apart from what they mean: help needs no torch for them."""

from __future__ import annotations

TARGETS = ("trtllm", "hf")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
BACKENDS = ("auto", "triton", "torch")
DEVICES = ("auto", "cpu", "cuda")
# Who is to read a Hugging Face result: see targets/profiles.py.
PROFILES = ("vllm", "sglang", "trtllm", "compressed-tensors")
# What becomes of layers that predict further tokens.
MTP = ("drop", "keep")
QUANTS = ("none", "fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4")
CACHES = ("none", "fp8")
# Bytes of a Hugging Face file: what the Hub's own tools use.
SHARD_SIZE = 5_000_000_000
# Recipe.scales: those that the source itself holds.
FROM_SOURCE = "source"
# What engines keep in the model's own dtype as a rule.
USUAL_EXCLUDES = ("lm_head",)
