"""Virtual pipeline chunks: which layer goes where, and what is refused."""

from __future__ import annotations

import operator

import pytest
import torch

from fuseport.converter.errors import (
    FuseportError,
    MissingTensorError,
    RecipeError,
    UnknownTensorError,
)
from fuseport.converter.parallel import Parallel
from fuseport.converter.stages import Held, Kind, chunks_as_one, gather_stage, table

KIND = Kind((2,), torch.float32)
WORDS = "embedding.word_embeddings.weight"


def chunk(*layers: int, more: tuple[str, ...] = ()) -> dict[str, Kind]:
    return {**{f"decoder.layers.{layer}.x": KIND for layer in layers}, **dict.fromkeys(more, KIND)}


def test_layers_that_are_dealt_out_in_turn_end_up_in_a_row() -> None:
    """2 ranks × 2 chunks × 2 layers: rank 0 holds layers 0, 1, 4, 5, rank 1 has 2, 3, 6, 7."""
    ranks = [[chunk(0, 1, more=(WORDS,)), chunk(0, 1)], [chunk(0, 1), chunk(0, 1)]]
    found = [(m.holder, m.chunk, m.name, m.wanter, m.result) for m in table(ranks, 8)]
    layer = "decoder.layers.{}.x".format
    assert found == [
        (0, 0, layer(0), 0, layer(0)),
        (0, 0, layer(1), 0, layer(1)),
        (0, 0, WORDS, 0, WORDS),
        (0, 1, layer(0), 1, layer(0)),
        (0, 1, layer(1), 1, layer(1)),
        (1, 0, layer(0), 0, layer(2)),
        (1, 0, layer(1), 0, layer(3)),
        (1, 1, layer(0), 1, layer(2)),
        (1, 1, layer(1), 1, layer(3)),
    ]


def test_chunks_of_one_pipeline_rank_are_just_numbered_on() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    found = gather_stage([{"decoder.layers.0.x": one}, {"decoder.layers.0.x": two}], 2, Parallel())
    assert list(found) == ["decoder.layers.0.x", "decoder.layers.1.x"]
    assert found["decoder.layers.0.x"] is one
    assert found["decoder.layers.1.x"] is two


def test_chunks_as_one_have_the_whole_model_s_numbers() -> None:
    one, two, words = (torch.ones(2) for _ in range(3))
    chunks = [{"decoder.layers.1.x": one, WORDS: words}, {"decoder.layers.0.x": two}]
    found = chunks_as_one(chunks, 8, pp_rank=1, pp_size=2)
    assert list(found) == ["decoder.layers.3.x", WORDS, "decoder.layers.6.x"]
    assert all(map(operator.is_, found.values(), (one, words, two)))
    with pytest.raises(RecipeError, match="must divide"):
        chunks_as_one(chunks, 6, pp_rank=1, pp_size=2)
    with pytest.raises(RecipeError, match=r"layers\.1\.x in chunk 0"):
        chunks_as_one(chunks, 4, pp_rank=1, pp_size=2)
    with pytest.raises(UnknownTensorError, match=f"{WORDS} is in two chunks"):
        chunks_as_one([{WORDS: words}, {WORDS: words}], 4, pp_rank=0, pp_size=2)


@pytest.mark.parametrize(
    ("ranks", "layers", "error", "says"),
    [
        ([[chunk(0)], [chunk(0), chunk(0)]], 3, RecipeError, "as many chunks"),
        ([[chunk(0)], [chunk(0)]], 3, RecipeError, "must divide the layers"),
        ([[chunk(0, 1)], [chunk(0)]], 2, RecipeError, r"layers.1.x in chunk 0 .* rank 0"),
        ([[chunk(0)], [{}]], 2, MissingTensorError, "rank 1 hold no tensors"),
        ([[chunk(0)], []], 2, MissingTensorError, "rank 1 hold no tensors"),
        (
            [[chunk(0, more=(WORDS,)), chunk(0, more=(WORDS,))]],
            2,
            UnknownTensorError,
            "embedding.* is in chunks 0 and 1",
        ),
    ],
)
def test_what_does_not_go_together(
    ranks: list[Held], layers: int, error: type[FuseportError], says: str
) -> None:
    with pytest.raises(error, match=says):
        table(ranks, layers)


def test_chunks_on_several_ranks_need_a_group() -> None:
    tensors = {"decoder.layers.0.x": torch.ones(2)}
    with pytest.raises(RecipeError, match="give pp_group"):
        gather_stage([tensors, tensors], 4, Parallel(pp_size=2))
