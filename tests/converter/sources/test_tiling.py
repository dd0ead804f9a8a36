import itertools
import random

import pytest

from fuseport.converter.errors import CorruptSourceError
from fuseport.converter.sources.tiling import check_tiling


def test_tiling_is_quick_and_exact_for_many_boxes():
    grid = [((r, c), (1, 4)) for r in range(20000) for c in (0, 4)]
    check_tiling("t", (20000, 8), grid)
    uneven = [((r, c), (1, n)) for r in range(20000) for c, n in ((0, 3), (3, 5))]
    check_tiling("t", (20000, 8), uneven)
    with pytest.raises(CorruptSourceError, match="overlap"):
        check_tiling("t", (20000, 8), [*uneven[:-2], ((19999, 0), (1, 5)), ((19999, 4), (1, 3))])
    with pytest.raises(CorruptSourceError, match="overlap"):
        check_tiling("t", (4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))])


@pytest.mark.parametrize("seed", range(200))
def test_agrees_with_counting_each_element(seed):
    numbers = random.Random(seed)
    shape = (3, 4)
    boxes = []
    while sum(a * b for _, (a, b) in boxes) < 12:
        offset = tuple(numbers.randrange(size) for size in shape)
        boxes.append(
            (offset, tuple(numbers.randint(0, s - o) for s, o in zip(shape, offset, strict=True)))
        )
    cells = [
        cell
        for offset, extent in boxes
        for cell in itertools.product(
            *(range(o, o + e) for o, e in zip(offset, extent, strict=True))
        )
    ]
    if sorted(cells) == list(itertools.product(*map(range, shape))):
        check_tiling("t", shape, boxes)
    else:
        with pytest.raises(CorruptSourceError, match="t: its chunks"):
            check_tiling("t", shape, boxes)
