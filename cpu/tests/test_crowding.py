"""The hint about cores that others hold: from the system's own count, once, and only where threads really wait."""

from __future__ import annotations

import sys
import time
import warnings

import pytest
from chatglm_cpu import crowding
from chatglm_cpu.crowding import STEPS, Watch


@pytest.fixture
def clock(monkeypatch):
    """Seconds on the wall, and seconds waited."""
    times = [0.0, 1.0]
    monkeypatch.setattr(crowding.time, "perf_counter", lambda: times[0])
    monkeypatch.setattr(crowding, "seconds_waited", lambda: times[1])
    monkeypatch.setattr(Watch, "told", False)
    return times


def walk(watch, clock, wall, waited):
    for _ in range(STEPS):
        watch.step()
    clock[0] += wall
    clock[1] = None if waited is None or clock[1] is None else clock[1] + waited


@pytest.mark.parametrize(("threads", "waited"), [(2, 0.39), (4, 0.79), (1, 0.9), (2, None)])
def test_no_hint_below_a_fifth_with_one_thread_or_where_nothing_is_counted(clock, threads, waited):
    watch = Watch(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            walk(watch, clock, 1.0, waited)


def test_one_hint_names_the_share_and_the_cure(clock):
    watches = Watch(4), Watch(4)
    with pytest.warns(UserWarning, match=r"4 threads waited 50% .*set_num_threads\(2\)") as warned:
        for watch in watches:
            for _ in range(3):
                walk(watch, clock, 1.0, 2.0)
    assert len(warned) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counted on Linux only")
def test_the_count_of_the_system_never_falls():
    before = crowding.seconds_waited()
    if before is None:
        pytest.skip("this kernel does not count it")
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    assert crowding.seconds_waited() >= before
