"""One hint when the kernels' threads wait for cores that other work holds.

All threads wait for the slowest at each kernel, so one that gets no core stops the others: on two busy cores a small
model was seen to decode five times faster with one thread than with two. Linux counts, for each thread, the time that
it could have run and did not; that is read at some steps, and costs the others nothing.
"""

from __future__ import annotations

import glob
import time
import warnings

STEPS = 64  # between two looks
SHARE = 0.2  # of the time, for each of the kernels' threads


class Watch:
    """Of one program: `step` is called after each of its runs."""

    told = False  # once a process

    def __init__(self, threads: int):
        self.threads, self.steps, self.last = threads, 0, None

    def step(self) -> None:
        self.steps += 1
        if self.threads == 1 or Watch.told or self.steps % STEPS:
            return
        now, waited = time.perf_counter(), seconds_waited()
        if self.last is not None and waited is not None:
            share = (waited - self.last[1]) / (self.threads * max(now - self.last[0], 1e-9))
            if share > SHARE:
                Watch.told = True
                warnings.warn(
                    f"chatglm_cpu: {self.threads} threads waited {share:.0%} of the time for cores that other work "
                    f"holds; fewer may decode faster: torch.set_num_threads({max(self.threads // 2, 1)})",
                    stacklevel=2,
                )
        self.last = None if waited is None else (now, waited)


def is_crowded(waited: float | None, began: float, threads: int) -> bool:
    """Whether `threads` threads had to wait for cores, since `seconds_waited()` was this at that `perf_counter()`."""
    now = seconds_waited()
    known = waited is not None and now is not None
    return known and now - waited > SHARE * threads * (time.perf_counter() - began)


def seconds_waited() -> float | None:
    """How long all threads of this process together could have run and had no core; None where it is not counted."""
    waited = 0
    try:
        for path in glob.glob("/proc/self/task/*/schedstat"):
            with open(path) as file:
                waited += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # a thread that ended meanwhile, or another system
        return None
    return waited / 1e9 or None
