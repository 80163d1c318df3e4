"""Batches of sequences of similar length, so that little is padding; in another order each epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

BATCHES_SORTED = 16  # together: within so many random batches examples are put beside those of their length


class SimilarLengths(Sampler):
    """The order of an epoch follows from seed and epoch alone, so that a resumed run sees what the whole one saw.

    lengths: of all examples; batch: how many are taken together.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = random.Random(f"{self.seed} {self.epoch}")
        indices = list(range(len(self.lengths)))
        order.shuffle(indices)
        together = self.batch * BATCHES_SORTED
        batches = []
        for start in range(0, len(indices), together):
            chunk = sorted(indices[start : start + together], key=lambda index: self.lengths[index])
            batches += [chunk[place : place + self.batch] for place in range(0, len(chunk), self.batch)]
        whole = [batch for batch in batches if len(batch) == self.batch]
        order.shuffle(whole)
        for batch in [*whole, *(batch for batch in batches if len(batch) < self.batch)]:  # what is left comes last
            yield from batch
