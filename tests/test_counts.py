"""How much the launches of whole models take, counted at full size without a GPU.

The expected numbers are written out from the models' sizes: a descriptor for each matrix, a tile
for each 8 × 512 elements or each 128 × 128 block, 4 bytes a tile and 192 bytes a descriptor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, str], dict[str, Any]]:
    # A process of its own, which finds `benchmarks`.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counts"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["case"], one["scheme"]): one for one in found}


def tiles(rows: int, columns: int, height: int = 8, width: int = 512) -> int:
    return -(-rows // height) * -(-columns // width)


def blocks(rows: int, columns: int) -> int:
    return tiles(rows, columns, 128, 128)


def matrix(rows: int, columns: int) -> int:
    """Tiles of what is contiguous on both sides: a long run is folded into rows of 512."""
    return tiles(rows * columns // 512, 512)


def check(found: dict[str, Any], kinds: int, descriptors: int, number: int) -> None:
    assert found["kinds"] == kinds
    assert found["descriptors"] == descriptors
    assert found["tiles"] == number
    assert found["table_bytes"] == 4 * number + 192 * descriptors


HIDDEN, FFN = 8192, 28672 // 8
DENSE = ((1024, HIDDEN), (128, HIDDEN), (128, HIDDEN), (HIDDEN, 1024), (FFN, HIDDEN), (FFN, HIDDEN),
         (HIDDEN, FFN))  # fmt: skip
WORDS = 2 * matrix(128256 // 8, HIDDEN)


def test_a_dense_rank(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    # A row of less than 32768 elements stays a row.
    norms = 161 * tiles(1, HIDDEN)
    plain, block = counted["llama-3-70b rank", "bf16"], counted["llama-3-70b rank", "block"]
    assert plain["tensors"] == 483
    assert plain["moves"] == 80 * 9 + 3
    check(plain, 1, 80 * 9 + 3, 80 * sum(matrix(*one) for one in DENSE) + norms + WORDS)
    check(block, 2, 80 * 9 + 3, 80 * sum(blocks(*one) for one in DENSE) + norms + WORDS)


ATTENTION = ((8192, 4096), (512, 4096), (512, 4096), (4096, 8192))
EXPERTS = ((1536, 4096), (1536, 4096), (4096, 1536)) * 16


def test_an_expert_rank(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    plain, block = counted["qwen3-235b rank", "bf16"], counted["qwen3-235b rank", "block"]
    assert plain["tensors"] == 94 * (7 + 2 * 16) + 3
    # q, k, v, o, router, four norms, and three matrices of each of 16 experts.
    descriptors = 94 * (9 + 3 * 16) + 3
    kept = 94 * (matrix(16, 4096) + 2 * tiles(1, 4096) + 2) + tiles(1, 4096)
    kept += 2 * matrix(151936 // 8, 4096)
    matrices = (*ATTENTION, *EXPERTS)
    check(plain, 1, descriptors, kept + 94 * sum(matrix(*one) for one in matrices))
    check(block, 2, descriptors, kept + 94 * sum(blocks(*one) for one in matrices))


def test_a_whole_model_for_eight_ranks(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    for scheme, kinds in (("bf16", 1), ("given", 2)):
        found = counted["llama-3-8b to tp 8", scheme]
        assert found["tensors"] == 32 * 6 + 3
        # qkv of three parts, dense, fc, gate, proj, two norms; three others; on each rank.
        assert found["moves"] == 8 * (32 * 9 + 3)
        assert (found["kinds"], found["descriptors"]) == (kinds, 8 * (32 * 9 + 3))


def test_tables_are_next_to_nothing(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    for one in counted.values():
        assert one["table_bytes"] < 4e-4 * one["data_bytes"]
