"""Lanes keep their order and their width, and none waits for another one."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from functools import partial

from fuseport.converter.lanes import Lanes

SOON = 20.0


def test_a_lane_of_one_keeps_its_order() -> None:
    lanes, met = Lanes(4, 1, "test"), defaultdict[int, list[int]](list)
    left = threading.Semaphore(0)

    def task(lane: int, number: int) -> None:
        time.sleep(random.random() / 2000)
        met[lane].append(number)
        left.release()

    for number in range(60):
        for lane in range(3):
            lanes.submit(lane, partial(task, lane, number))
    assert all(left.acquire(timeout=SOON) for _ in range(180))
    lanes.close()
    assert met == {lane: list(range(60)) for lane in range(3)}


def test_no_more_than_the_width_of_a_lane_runs() -> None:
    lanes, lock, running, most = Lanes(8, 2, "test"), threading.Lock(), Counter[int](), set[int]()
    left = threading.Semaphore(0)

    def task(lane: int) -> None:
        with lock:
            running[lane] += 1
            most.add(running[lane])
        time.sleep(0.002)
        with lock:
            running[lane] -= 1
        left.release()

    for _ in range(20):
        for lane in range(4):
            lanes.submit(lane, partial(task, lane))
    assert all(left.acquire(timeout=SOON) for _ in range(80))
    lanes.close()
    assert max(most) == 2


def test_a_lane_that_is_stuck_leaves_threads_to_the_others() -> None:
    lanes, stuck, passed = Lanes(3, 2, "test"), threading.Event(), threading.Semaphore(0)
    for _ in range(10):
        lanes.submit("stuck", lambda: stuck.wait(SOON))
    for number in range(10):
        lanes.submit(number % 2, passed.release)
    assert all(passed.acquire(timeout=SOON) for _ in range(10))
    stuck.set()
    lanes.close()


def test_what_waits_is_left_out_on_closing() -> None:
    lanes, begun, may_end = Lanes(2, 1, "test"), threading.Event(), threading.Event()
    met: list[int] = []

    def first() -> None:
        begun.set()
        may_end.wait(SOON)

    lanes.submit("a", first)
    lanes.submit("a", partial(met.append, 1))
    assert begun.wait(SOON)
    closing = threading.Thread(target=lanes.close)
    closing.start()
    end = time.monotonic() + SOON
    while lanes._waiting and time.monotonic() < end:
        time.sleep(0.001)
    assert not lanes._waiting
    may_end.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert met == []
