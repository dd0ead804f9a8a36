"""The memory of a conversion that is over is kept for the next one."""

from __future__ import annotations

import torch

from fuseport.converter.host_output import Block
from fuseport.converter.slabs import _Kept


def test_a_ring_is_kept_for_the_next_of_its_size_and_device() -> None:
    kept, gpu = _Kept(), torch.device("cuda", 0)
    block = Block()
    block.reserve(4096)
    for size, device, same in ((4096, gpu, True), (8192, gpu, False), (4096, "cuda:1", False)):
        kept.push(block, gpu)
        assert (kept.pop(size, torch.device(device)) is block) == same
        # What does not fit is not kept either: there is never a second ring.
        assert kept.pop(4096, gpu) is not block
