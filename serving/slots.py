"""The keys and values of a running batch: rows of different lengths that join and leave between two tokens.

Row b of `Slots` lies at 0 ... length_b - 1 whatever the others have (left-aligned, no padding), and a mask hides what
is behind. So joining copies the keys of one prompt, leaving copies the last row into the hole, nobody else moves, and
a row's keys lie where they would lie if it ran alone.

`Slots` has what the model's `forward` asks of a cache: `get_seq_length` and `update`.

Shapes: N running rows, H heads, D head size, K keys of the longest row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .prompts import PromptStates

CHUNK = 256  # tokens of room that the rows grow by


class Slots:
    """Rows 0 ... N - 1 are running; `lengths` has the tokens of each, those of a P-tuning prefix included."""

    def __init__(self, prefix_length: int = 0):
        self.prefix_length = prefix_length
        self.lengths: list[int] = []
        self.layers: list[list[Tensor]] = []  # keys and values of each layer, [rows, H, places, D]
        self.room = (0, 0)  # rows, places
        self.total = 0
        self.ends: Tensor | None = None

    def clear(self) -> None:
        self.lengths, self.layers, self.room = [], [], (0, 0)

    def join(self, states: PromptStates) -> None:
        """Appends a row that holds the keys of a prompt."""
        layers, length, row = list(states), states.length, len(self.lengths)
        self.layers = self.layers or [[key[:0, :, :0], value[:0, :, :0]] for key, value in layers]
        self._reserve(row + 1, max([length, *self.lengths]) + 1)
        for ours, new in zip(self.layers, layers):
            for buffer, state in zip(ours, new):
                buffer[row, :, :length] = state[0]
        self.lengths.append(length)

    def leave(self, row: int, wipe: bool = False) -> int:
        """Frees a row, whose place the last one takes; returns which that was. `wipe`: its keys may be NaN, which a
        weight of 0 does not hide."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        for layer in self.layers:
            for buffer in layer:
                if wipe:
                    buffer[row].zero_()
                if row != last:
                    buffer[row, :, :length] = buffer[last, :, :length]
        if row != last:
            self.lengths[row] = length
        return last

    def begin_step(self) -> Tensor:
        """Before each row gets one token: what it may not read, [N, 1, 1, K] bool, the prefix left out."""
        self.total = max(self.lengths) + 1
        self._reserve(len(self.lengths), self.total)
        device = self.layers[0][0].device
        self.ends = torch.tensor(self.lengths, device=device)
        hidden = torch.arange(self.total, device=device) > self.ends[:, None]
        return hidden[:, None, None, self.prefix_length :]

    def end_step(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """[N, H, 1, D] each -> all keys and values, [N, H, K, D]."""
        rows, ends = torch.arange(len(key), device=key.device), self.ends.to(key.device)
        for buffer, new in zip(self.layers[layer_idx], (key, value)):
            buffer[rows, :, ends] = new[:, :, 0]
        keys, values = (buffer[: len(key), :, : self.total] for buffer in self.layers[layer_idx])
        return keys, values

    def _reserve(self, rows: int, tokens: int) -> None:
        """Room for so much; gives room back when it is more than four times that."""
        wanted = 1 << (rows - 1).bit_length(), -(-tokens // CHUNK) * CHUNK
        is_enough = all(have >= want for have, want in zip(self.room, wanted))
        if is_enough and math.prod(self.room) <= 4 * math.prod(wanted):
            return
        if not is_enough:
            wanted = tuple(max(want, have) if have <= 4 * want else want for have, want in zip(self.room, wanted))
        used, length = len(self.lengths), max(self.lengths, default=0)
        self.room, after = tuple(map(min, self.room, wanted)), wanted  # what is true if memory ends on the way
        for layer in self.layers:
            for index, old in enumerate(layer):
                # zeros: what a hidden key holds is multiplied by a weight of 0, and 0 * NaN is NaN
                layer[index] = old.new_zeros(after[0], old.shape[1], after[1], old.shape[3])
                layer[index][:used, :, :length] = old[:used, :, :length]
        self.room = after
