"""Before anybody asks: engines compile and choose their kernels at the first use of each, seconds in all, so a server
takes that time before it listens."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .batching import Batch, Generation, Gone
from .prompts import Prompts
from .sampling import Sampling

ROWS = (*range(1, 17), 24, 32)  # answers at once: the CPU engine has kernels for each up to 16, and ways beyond
PROMPTS = (24, 32, 64, 128, 256, 512)  # tokens, which an engine may multiply each in a way of their own


class Endless:
    """A grammar in which no answer ends."""

    def __init__(self, end_ids: set[int]):
        self.end_ids = torch.tensor(sorted(end_ids))

    def mask(self, scores: Tensor) -> Tensor:
        return scores.index_fill(0, self.end_ids.to(scores.device), float("-inf"))

    def accept(self, token: int) -> None:
        pass


def warm_up(model, slots: int, ids: list[int]) -> None:
    """Computes the prompt `ids`, and a token for each number of answers to it up to `slots`; of longer prompts the
    first layer's first product, which has all that differs.

    In a batch of its own: figures and prompts of the one that serves are not touched. An error of the model is raised,
    so that a server that could answer nobody does not start.
    """
    batch, failed = Batch(model, slots), []

    def hear(event) -> None:
        if getattr(event, "error", None) is not None:
            failed.append(event.error)

    for rows in sorted({*(number for number in ROWS if number < slots), slots}):
        grammar = Endless(batch.end_ids)
        batch.add(Generation(ids, hear, 2, Sampling(temperature=0), grammar) for _ in range(rows))
        while batch.step():
            pass
        if failed:
            raise failed[0]
    for tokens in PROMPTS:
        first_product(model, [*ids[:1] * (tokens - len(ids)), *ids])


@torch.inference_mode()
def first_product(model, ids: list[int]) -> None:
    def stop() -> None:
        raise Gone

    with contextlib.suppress(Gone):
        model(**Prompts([ids], model, stop).inputs)
