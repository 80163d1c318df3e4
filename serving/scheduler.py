"""The thread in which the batch runs, and the door to it: a bounded queue, cancelling, an end within a stated time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from .batching import Batch, Work

logger = logging.getLogger("serving")


class QueueFull(Exception):
    """As many requests wait as may. `retry_after`: seconds until there may be room."""

    def __init__(self, waiting: int, queue: int, retry_after: int):
        super().__init__(f"{waiting} of at most {queue} answers are waiting: try again in {retry_after} s")
        self.retry_after = retry_after


class TooMany(ValueError):
    """One request asks for more answers than may ever wait."""

    def __init__(self, asked: int, queue: int):
        super().__init__(f"the request asks for {asked} answers, and at most {queue} may wait")


class ShuttingDown(Exception):
    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Scheduler:
    """Runs a batch in a thread of its own, from `start` to `close`."""

    def __init__(self, batch: Batch, queue: int = 64):
        self.batch, self.queue = batch, queue
        self.inbox: list[Work] = []
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="batch", daemon=True)

    def start(self) -> Scheduler:
        self.thread.start()
        return self

    @property
    def waiting(self) -> int:
        return len(self.inbox) + len(self.batch.waiting)

    def submit(self, works: Sequence[Work]) -> None:
        """Puts works into the queue, all of them or none.

        Raises:
            QueueFull, ShuttingDown, TooMany.
        """
        if len(works) > self.queue:
            raise TooMany(len(works), self.queue)
        with self.changed:
            if self.closing:
                raise ShuttingDown
            if self.waiting + len(works) > self.queue:
                seconds = self.waiting * self.batch.answer_seconds / self.batch.slots
                raise QueueFull(self.waiting, self.queue, min(max(1, round(seconds)), 120))
            self.inbox.extend(works)
            self.changed.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Their rows are free before the next token, and a prompt of theirs stops at its next layer."""
        for work in works:
            work.cancelled = True
        with self.changed:
            self.changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more work, gives what there is `seconds` to finish, and ends the rest; returns when all of it has
        its End and the thread has ended."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(seconds)
        self.batch.stopped_by = ShuttingDown()
        self.thread.join()

    def _run(self) -> None:
        while self._next_inbox():
            try:
                self.batch.step()
            except Exception as error:  # a fault of ours; a server goes on
                logger.exception("a step of the batch failed")
                self.batch.end_all(error)
        self.batch.end_all(ShuttingDown())

    def _next_inbox(self) -> bool:
        """Waits for work and takes it; False when it is time to end."""
        with self.changed:
            busy = self.batch.running or self.batch.waiting
            while not busy and not self.inbox and not self.closing:
                self.changed.wait()
            self.batch.add(self.inbox)
            self.inbox.clear()
            stopped = self.batch.stopped_by is not None
            return not stopped and bool(self.batch.running or self.batch.waiting or not self.closing)
