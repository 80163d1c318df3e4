"""Prompts before they join the batch: several of them, one behind the other in one row, are computed as one.

No padding: each reads itself alone and has the positions that it has alone. It costs what its tokens cost, and a
product of many rows costs less a row.

Shapes: H heads, S tokens of all prompts together, P tokens of a P-tuning prefix, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class PromptStates:
    """Keys and values of one prompt, [1, H, P + its tokens, D] of each layer, for the rows that answer it."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.layers[index] for index in sorted(self.layers))

    @property
    def length(self) -> int:
        return next(iter(self))[0].shape[2]

    @property
    def bytes(self) -> int:
        return sum(state.nbytes for layer in self for state in layer)


class Prompts:
    """Prompts while they are computed: what the model's `forward` takes, and a cache as it asks for.

    `between` is called once a layer, before its attention: others may take a step there, and what it raises ends the
    computation.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], model, between: Callable[[], None] = lambda: None):
        self.prompts, self.model, self.between = prompts, model, between
        ends = list(itertools.accumulate(map(len, prompts)))
        self.places = list(zip([0, *ends], ends))
        self.states = [PromptStates() for _ in prompts]

    @property
    def inputs(self) -> dict:
        """Arguments of `forward`. Raises a ValueError where one of several prompts is none."""
        device = self.model.device
        ids = torch.tensor([list(itertools.chain(*self.prompts))], device=device)
        if len(self.prompts) == 1:
            return {"input_ids": ids, "past_key_values": self}
        positions, hidden = [], torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device)
        for start, end in self.places:
            own = ids[:, start:end]
            positions.append(self.model.get_position_ids(own, [end - start - 2], device, [True]))  # ends [gMASK] <sop>
            hidden[:, :, start:end, start:end] = self.model.get_masks(own, device)
        positions = torch.cat(positions, dim=-1)
        return {"input_ids": ids, "position_ids": positions, "attention_mask": hidden, "past_key_values": self}

    @property
    def last(self) -> Tensor:
        """Places of the prompts' last tokens."""
        return torch.tensor([end - 1 for _, end in self.places])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # before the prompts

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """[1, H, P + S, D] each."""
        self.between()
        prefix = key.shape[2] - self.places[-1][1]
        for states, (start, end) in zip(self.states, self.places):
            # copies: these may be views of a product that would be kept alive, or used again
            own = [torch.cat((of[:, :, :prefix], of[:, :, prefix + start : prefix + end]), 2) for of in (key, value)]
            states.layers[layer_idx] = tuple(own)
        return self.states[0].layers[layer_idx] if len(self.states) == 1 else (key, value)
