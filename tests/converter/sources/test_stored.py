import itertools
import random

import pytest
import torch

from fuseport.converter.errors import CorruptSourceError
from fuseport.converter.sources import stored as stored_module
from fuseport.converter.sources.stored import FileRange, Piece, Stored, close_files


def cut(shape, starts):
    """Boxes of a grid: `starts` holds the cuts along each axis, without 0 and the end."""
    boxes = [((), ())]
    for size, cuts in zip(shape, starts, strict=True):
        edges = [0, *cuts, size]
        boxes = [
            ((*offset, a), (*extent, b - a))
            for offset, extent in boxes
            for a, b in itertools.pairwise(edges)
        ]
    return boxes


def part(whole, offset, extent):
    return whole[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))]


def on_disk(whole, boxes, folder):
    pieces = []
    for number, (offset, extent) in enumerate(boxes):
        path = folder / f"{number % 3}.bin"
        data = part(whole, offset, extent).contiguous().reshape(-1).view(torch.uint8).numpy()
        with path.open("ab") as file:
            file.write(b"?" * 5)
            at = file.tell()
            file.write(data.tobytes())
        pieces.append(Piece(offset, extent, FileRange(path, at)))
    return Stored("t", tuple(whole.shape), whole.dtype, tuple(pieces))


def in_memory(whole, boxes, _folder):
    pieces = tuple(Piece(o, e, part(whole, o, e)) for o, e in boxes)
    return Stored("t", tuple(whole.shape), whole.dtype, pieces)


def check(stored, whole, start, stop):
    out = torch.full((stop - start,), -1.0).to(whole.dtype)
    stored.read_flat(start, stop, out)
    expected = whole.reshape(-1)[start:stop]
    assert torch.equal(out.view(torch.uint8), expected.contiguous().view(torch.uint8))


CASES = [
    ((), ()),
    ((7,), ([],)),
    ((7,), ([2, 3],)),
    ((6, 8), ([], [])),
    ((6, 8), ([2], [])),
    ((6, 8), ([], [2, 4])),
    ((6, 8), ([1, 4], [3])),
    ((3, 5, 4), ([1, 2], [], [])),
    ((3, 5, 4), ([], [], [1])),
    ((3, 5, 4), ([1], [2], [3])),
    ((2, 3, 4, 5), ([1], [1], [], [2, 3])),
    ((1, 1, 9), ([], [], [4])),
]


@pytest.mark.parametrize("make", [on_disk, in_memory])
@pytest.mark.parametrize(("shape", "starts"), CASES)
@pytest.mark.parametrize("block", [8, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_every_range(tmp_path, monkeypatch, make, shape, starts, block, dtype):
    monkeypatch.setattr(stored_module, "_BLOCK_BYTES", block)
    whole = torch.randn(shape).to(dtype)
    stored = make(whole, cut(shape, starts), tmp_path)
    total = whole.numel()
    ranges = [(a, b) for a in range(total + 1) for b in range(a, total + 1)]
    for start, stop in random.Random(0).sample(ranges, min(len(ranges), 150)):
        check(stored, whole, start, stop)
    check(stored, whole, 0, total)


def test_long_rows_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_module, "_LONG_ROW_BYTES", 1)
    whole = torch.randn(5, 12)
    stored = on_disk(whole, cut((5, 12), ([2], [7])), tmp_path)
    for start, stop in [(0, 60), (3, 50), (12, 24), (8, 9)]:
        check(stored, whole, start, stop)


def test_short_rows_are_read_in_blocks(tmp_path, monkeypatch):
    whole = torch.randn(1000, 8)
    stored = on_disk(whole, cut((1000, 8), ([], [4])), tmp_path)
    calls = []
    preadv = stored_module.os.preadv

    def count(*args):
        calls.append(args)
        return preadv(*args)

    monkeypatch.setattr(stored_module.os, "preadv", count)
    check(stored, whole, 0, 8000)
    assert len(calls) == 2


def test_short_reads_go_on(tmp_path, monkeypatch):
    whole = torch.randn(100)
    stored = on_disk(whole, cut((100,), ([],)), tmp_path)
    preadv = stored_module.os.preadv
    monkeypatch.setattr(stored_module.os, "preadv", lambda fd, b, at: preadv(fd, [b[0][:7]], at))
    check(stored, whole, 10, 90)


def test_strided_memory_and_a_grid_of_another_shape():
    whole = torch.arange(24.0).view(2, 3, 4)
    pieces = tuple(Piece((0, 0, c), (2, 3, 2), whole[:, :, c : c + 2]) for c in (0, 2))
    stored = Stored("t", (3, 8), torch.float32, pieces, (2, 3, 4))
    for start, stop in [(0, 24), (5, 17), (23, 24)]:
        check(stored, whole, start, stop)


def test_whole_rows_need_no_reshape():
    whole = torch.arange(20.0).view(4, 5).t()
    check(Stored("t", (5, 4), whole.dtype, (Piece((0, 0), (5, 4), whole),)), whole, 3, 19)


def test_empty():
    stored = Stored("t", (0, 4), torch.float32, ())
    stored.read_flat(0, 0, torch.empty(0))
    assert stored.numel == stored.nbytes == 0


def test_truncated_and_missing_files_are_named(tmp_path):
    whole = torch.randn(100)
    stored = on_disk(whole, cut((100,), ([],)), tmp_path)
    path = tmp_path / "0.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptSourceError, match=r"0\.bin.*'t'.*4 bytes early"):
        stored.read_flat(0, 100, torch.empty(100))
    close_files()
    path.unlink()
    with pytest.raises(CorruptSourceError, match=r"0\.bin.*'t'"):
        stored.read_flat(0, 100, torch.empty(100))


def test_files_are_closed(tmp_path):
    whole = torch.randn(10)
    close_files()
    before = len(list(stored_module.Path("/proc/self/fd").iterdir()))
    for number in range(80):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(on_disk(whole, cut((10,), ([],)), folder), whole, 0, 10)
    assert len(list(stored_module.Path("/proc/self/fd").iterdir())) <= before + 64
    close_files()
    assert len(list(stored_module.Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("start", "stop", "out"),
    [
        (-1, 2, torch.empty(3)),
        (0, 11, torch.empty(11)),
        (5, 4, torch.empty(0)),
        (0, 4, torch.empty(5)),
        (0, 4, torch.empty(4, dtype=torch.int32)),
        (0, 4, torch.empty(8)[::2]),
        (0, 4, torch.empty(4, device="meta")),
    ],
)
def test_wrong_calls(start, stop, out):
    whole = torch.randn(10)
    stored = in_memory(whole, [((0,), (10,))], None)
    with pytest.raises(ValueError, match="t:"):
        stored.read_flat(start, stop, out)
